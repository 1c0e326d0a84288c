"""Where logits or tokens come from, besides one `PreTrainedModel` for each generation."""
