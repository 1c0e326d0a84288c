"""cutters: how what is not kept is taken away."""
