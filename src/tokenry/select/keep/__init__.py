"""keep: what is kept, and by which score."""
