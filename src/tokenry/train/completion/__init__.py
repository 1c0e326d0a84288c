"""Training a model of code on values, types and statements at once."""
