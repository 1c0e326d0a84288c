"""What a comparison builds before it measures, and keeps in the cache folder for the next time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["digest", "write"]


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """Complete or absent: saved beside its place, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    save(part)
    part.rename(path)


def digest(value: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
