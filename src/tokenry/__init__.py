"""tokenry: everything that happens to a token in a transformer.

Importing `tokenry` is instant; torch and transformers are imported by the first name that needs them.
"""

from importlib import import_module
from typing import Any

from .errors import InputError

__version__ = "0.1.0"
__all__ = ["InputError", "__version__", "capture", "decode", "generate", "judge", "load", "measure", "select"]

_HOMES = {"load": "models", "generate": "decode.api", "capture": "trace", "Trace": "trace"}
_PACKAGES = {
    "attention",
    "catalog",
    "decode",
    "hooks",
    "judge",
    "measure",
    "method",
    "models",
    "select",
    "trace",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module 'tokenry' has no attribute {name!r}")
