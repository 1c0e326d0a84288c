"""Tokens from an OpenAI-compatible server, checked and repaired here."""
