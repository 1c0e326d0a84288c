"""What the hyperdimensional probe reads: documents and their words, and compressed states."""
