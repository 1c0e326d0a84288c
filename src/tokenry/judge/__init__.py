"""judge: what is an answer worth?"""

from ..lazy import exports

_HOMES = {"Reference": "slop", "SlopProfile": "slop", "human_reference": "slop"}
__all__ = sorted(_HOMES)
__getattr__ = exports(__name__, _HOMES)
