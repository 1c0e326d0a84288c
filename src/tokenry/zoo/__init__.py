"""zoo: small real models, trained by recipes from a seed on generated data.

`tokenry.load("zoo/reasoner")` loads one; `tokenry zoo build reasoner` builds it.
"""

from ..lazy import exports

_HOMES = {"RECIPES": "recipes", "Recipe": "recipes", "build": "recipes", "find_recipe": "recipes"}
__all__ = sorted(_HOMES)
__getattr__ = exports(__name__, _HOMES)
