"""Where tokens come from, besides a model of transformers in this process."""
