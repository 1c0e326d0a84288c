"""read: what does a token carry?"""

from ..core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
