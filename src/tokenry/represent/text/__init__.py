"""text: prompt embeddings."""
