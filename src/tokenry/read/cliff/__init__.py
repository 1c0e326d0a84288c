"""What refusal-cliff is made of: examples, curves, heads, selection of training data, pictures."""
