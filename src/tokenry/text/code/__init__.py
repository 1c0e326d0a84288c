"""Programs as two aligned sequences, what each name is and which names are visible where."""
