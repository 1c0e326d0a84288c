"""generation: the left-to-right loop, its engine, sampler, sequences and monitors."""
