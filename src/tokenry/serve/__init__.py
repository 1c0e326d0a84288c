"""The server: OpenAI's routes in front of any engine."""
