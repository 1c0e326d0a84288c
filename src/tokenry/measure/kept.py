"""What a comparison builds before it measures, and keeps in the cache folder for the next time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..outputs import write_file

__all__ = ["digest", "write"]


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """A file, complete or absent, also with two writers at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, save)


def digest(value: Any) -> str:
    """A short hash of JSON values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
