"""zoo: small real models, trained by recipes from a seed on generated data.

`tokenry.load("zoo/reasoner")` loads one; `tokenry zoo build reasoner` builds it.
"""

from ..core.lazy import exports

__getattr__, __dir__, __all__ = exports(__name__, __file__)
