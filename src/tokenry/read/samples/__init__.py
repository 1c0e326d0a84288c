"""samples: what a model writes to questions of its own accord."""
