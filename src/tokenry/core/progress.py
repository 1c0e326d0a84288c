"""How long work says how far it has come."""

from __future__ import annotations

from typing import Any, Protocol

__all__ = ["Progress"]


class Progress(Protocol):
    """Called after each part of long work with how many parts are done, and of how many; beside these may stand what
    runs now, or a loss."""

    def __call__(self, done: int, total: int, /, *beside: Any) -> None: ...
