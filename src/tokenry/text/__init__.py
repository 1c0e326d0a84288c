"""text: words, spans, answers, and the text of a growing list of tokens."""
