"""Where models are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder", "zoo_folders"]


def cache_folder() -> Path:
    """Where converted models live: $TOKENRY_CACHE, or `tokenry` in the user's cache folder."""
    base = os.environ.get("TOKENRY_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tokenry"


def zoo_folders(name: str) -> tuple[Path, Path]:
    """Where the model zoo/`name` may be: in the package, and where it is built."""
    return Path(__file__).parents[1] / "zoo" / "checkpoints" / name, cache_folder() / "zoo" / name
