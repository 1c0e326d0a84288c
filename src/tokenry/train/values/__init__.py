"""values: episodes, and the loss and the trainer of the values of dead ends."""
