"""core: errors, methods and their fields, outputs; imports no torch."""
