"""text: what a text is worth, without its answer."""
