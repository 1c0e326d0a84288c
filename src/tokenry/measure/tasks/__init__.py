"""tasks: what arms are given, and how what they do is scored."""
