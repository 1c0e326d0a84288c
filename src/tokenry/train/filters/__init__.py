"""filters: the loss of a filter of confidences, what it is worth, and its trainer."""
