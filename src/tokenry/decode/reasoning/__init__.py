"""reasoning: reflection words, and steps that are written, judged and kept."""
