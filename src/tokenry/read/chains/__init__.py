"""chains: the tokens that an answer rests on, and what the model makes of small changes to them."""
