"""judge: what is an answer worth?"""

from ..core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
