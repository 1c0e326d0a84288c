"""token_values: graded solutions, and the loss and the trainer of the values of tokens."""
