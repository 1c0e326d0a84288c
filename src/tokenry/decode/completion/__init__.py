"""Completion of code: what stands left of the cursor, what a model writes there, and in which order it is offered."""
