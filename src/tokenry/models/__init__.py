"""models: loading, and everything we know about a model's structure."""

from ..core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
