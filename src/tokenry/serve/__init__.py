"""The server: OpenAI's routes in front of any engine."""

from ..core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
