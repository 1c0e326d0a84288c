"""What a comparison builds before it measures, and keeps in the cache folder for the next time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from ..files import explained

__all__ = ["digest", "read", "write"]

T = TypeVar("T")


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Complete or absent: saved beside its place, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save(part)
    part.rename(path)


def read(path: Path, load: Callable[[Path], T]) -> T:
    """What `load` makes of a kept file; one that is broken is refused."""
    with explained(f"what was kept in {str(path)!r} cannot be read", "delete it, and it is made again"):
        return load(path)


def digest(value: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
