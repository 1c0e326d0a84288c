"""heads: which attention heads look things up."""
