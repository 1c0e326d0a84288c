"""scaling: results over levels of effort: their table, adaptive sampling, the picture."""
