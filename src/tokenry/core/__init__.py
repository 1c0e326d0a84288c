"""core: errors, methods and their fields, files in and out."""
