"""preference: pairs and their losses."""
