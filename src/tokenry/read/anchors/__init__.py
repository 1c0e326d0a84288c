"""What sentences of a chain of thought matter for: attention, suppression, and resampled continuations."""
