"""train: how to teach with token-level signal?"""

from ..core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
