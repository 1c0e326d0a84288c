"""trace: what one forward computed, recorded and saved."""

from ..core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
