"""A training that goes before a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from tqdm.auto import tqdm

from ..core.progress import Progress

__all__ = ["training"]


@contextmanager
def training(description: str) -> Iterator[tuple[str, Progress]]:
    """A folder for what a trainer writes while it runs, which nobody keeps, and what draws its steps as a bar."""
    with TemporaryDirectory() as scratch, tqdm(desc=description) as bar:

        def advance(done: int, total: int, /, *_: Any) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield scratch, advance
