"""weights: what weights say without a forward."""
