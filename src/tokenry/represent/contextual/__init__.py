"""A decoder that is given a summary of the text before the text: configuration, splice, texts to ids, training."""
