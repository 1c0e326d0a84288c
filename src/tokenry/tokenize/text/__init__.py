"""text: measures, noise, reports and fixed tokens of text tokenizers."""
