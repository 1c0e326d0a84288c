"""tasks: what subjects are given, and how what they do is scored."""
