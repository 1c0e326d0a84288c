"""morphology: dictionaries of roots and suffixes, forms that share an id, and the tokenizer made of them."""
