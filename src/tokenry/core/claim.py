"""What a paper promises, as a number."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Claim"]


class Claim(NamedTuple):
    """A published number.

    Attributes:
        number: as it is printed; empty where none could be read.
        unit: of the number, with what it is compared with.
        source: model and data that it was measured with.
        tested_by: the experiment that measures it here, where that is not the one called as the method.
    """

    number: str
    unit: str
    source: str
    tested_by: str | None = None

    def __str__(self) -> str:
        return f"{self.number} {self.unit}".strip()
