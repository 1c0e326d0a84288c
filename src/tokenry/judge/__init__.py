"""judge: what is an answer worth?"""

from importlib import import_module
from typing import Any

_HOMES = {"Reference": "slop", "SlopProfile": "slop", "human_reference": "slop"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'tokenry.judge' has no attribute {name!r}")
