"""What runs a model under the decode loop, besides transformers."""
