"""Strategies for easy, normal and hard questions: what is put behind the question, temperature and budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import InputError
from ...core.fields import Temperature, check
from ...core.files import explained, read_json
from ...core.schemas import Fields, checked
from ...learned.difficulty_probe import CLASSES

__all__ = ["DEFAULT_STRATEGIES", "NORMAL", "Strategy", "read_strategies"]

EASY, NORMAL, HARD = CLASSES


@dataclass(frozen=True)
class Strategy:
    """How questions of one class are answered.

    Attributes:
        name: "easy", "normal" or "hard".
        suffix: put right behind the question, its leading space or line break included.
        temperature: of sampling, > 0.
        budget: share of `max_new_tokens`, in (0, 1].
    """

    name: str
    suffix: str = ""
    temperature: float = 0.8
    budget: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise InputError(
                f"temperature={self.temperature} of strategy {self.name!r} is not allowed; give a number > 0"
            )
        check(f"temperature of strategy {self.name!r}", self.temperature, Temperature)
        if not 0 < self.budget <= 1:
            raise InputError(f"budget={self.budget} of strategy {self.name!r} is not allowed; give a share in (0, 1]")

    def __str__(self) -> str:
        return f"{self.name} (temperature {self.temperature}, budget {self.budget})"

    def tokens(self, max_new_tokens: int) -> int:
        """The budget in tokens: the share rounded down, at least 1."""
        return max(1, math.floor(round(self.budget * max_new_tokens, 6)))


DEFAULT_STRATEGIES = (
    Strategy(EASY, "\n\nGo straight to the solution, then check the result once.", 0.5, 0.4),
    Strategy(NORMAL, "\n\nThink step by step and proceed systematically.", 0.8, 1.0),
    Strategy(HARD, "\n\nYou have little room: settle on one approach and stop early with your best answer.", 0.4, 0.5),
)


class StrategyRow(Fields):
    """A strategy in a file."""

    name: str
    suffix: str = ""
    temperature: float = 0.8
    budget: float = 1.0

    def strategy(self) -> Strategy:
        return Strategy(self.name, self.suffix, self.temperature, self.budget)


def read_strategies(value: Any) -> Any:
    """Strategies from a JSON file: a list of objects with name, suffix, temperature and budget. Other values pass."""
    if not isinstance(value, str | Path):
        return value
    problem = f"the file {str(value)!r} is no JSON list of strategies"
    remedy = "give objects with name, suffix, temperature and budget"
    with explained(problem, remedy):
        found = read_json(value)
        return tuple(checked(StrategyRow, one, problem, remedy).strategy() for one in found)
