"""Results: accuracy and tokens of questions that were each answered at several levels of effort."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import ConfigDict, Field

from ...core.errors import InputError
from ...core.schemas import Exchanged

__all__ = ["ResultRow", "Results", "checked_arrays"]

logger = logging.getLogger(__name__)


class ResultRow(Exchanged):
    """One run, or the mean of several, of a question at a level of effort."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    question: str = Field(min_length=1)
    level: str | int | float
    accuracy: float = Field(ge=0, le=1)
    tokens: float = Field(gt=0, description="generated tokens, without those of the prompt")


@dataclass(frozen=True)
class Results:
    """N questions at L levels, from the least effort to the most.

    Attributes:
        accuracies: (N, L), each in [0, 1].
        tokens: (N, L) generated tokens.
    """

    accuracies: np.ndarray
    tokens: np.ndarray
    questions: Sequence[str]
    levels: Sequence[str | float]

    def __post_init__(self) -> None:
        for name, given in (("questions", self.questions), ("levels", self.levels)):
            if isinstance(given, str):
                raise InputError(f"{name} are the text {given[:40]!r}; give a list with a name each")
        accuracies, tokens = checked_arrays(self.accuracies, self.tokens)
        if accuracies.shape != (len(self.questions), len(self.levels)):
            raise InputError(
                f"accuracies have the shape {accuracies.shape} for {len(self.questions)} questions and "
                f"{len(self.levels)} levels; give a row a question and a column a level"
            )
        object.__setattr__(self, "accuracies", accuracies)
        object.__setattr__(self, "tokens", tokens)

    @classmethod
    def from_arrays(cls, accuracies: object, tokens: object) -> Results:
        """Questions and levels are numbered from 1."""
        a, t = checked_arrays(accuracies, tokens)
        return cls(a, t, [str(i + 1) for i in range(len(a))], [j + 1 for j in range(a.shape[1])])

    @classmethod
    def from_rows(cls, rows: Iterable[ResultRow]) -> Results:
        """Several rows of a question and level are runs, of which the mean is taken.

        Levels that are all numbers are sorted; names stay in the order in which they first appear.

        Raises:
            InputError: no rows, levels of both kinds, fewer than two of them, or a question that lacks one.
        """
        cells: dict[tuple[str, str | float], list[tuple[float, float]]] = {}
        for row in rows:
            cells.setdefault((row.question, row.level), []).append((row.accuracy, row.tokens))
        questions = list(dict.fromkeys(question for question, _ in cells))
        levels = _ordered(list(dict.fromkeys(level for _, level in cells)))
        missing = next(((q, v) for q in questions for v in levels if (q, v) not in cells), None)
        if missing:
            raise InputError(
                f"the question {missing[0][:40]!r} has no row at the level {missing[1]!r}; "
                "give every question at every level, or leave it out"
            )
        means = np.array([[np.mean(cells[q, v], axis=0) for v in levels] for q in questions], float)
        return cls(means.reshape(len(questions), len(levels), 2)[..., 0], means[..., 1], questions, levels)


def _ordered(levels: list[str | float]) -> list[str | float]:
    if len(levels) < 2:
        raise InputError(f"there are {len(levels)} levels of effort; give rows of at least 2")
    texts = [isinstance(level, str) for level in levels]
    if any(texts) and not all(texts):
        raise InputError(f"some levels are numbers and some are texts ({levels[texts.index(True)]!r}); give one kind")
    return levels if any(texts) else sorted(levels, key=float)


def checked_arrays(accuracies: object, tokens: object) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays (questions, levels). Says on the log where mean tokens do not grow from level to level.

    Raises:
        InputError: shapes that differ or are no table of at least one question and two levels, an accuracy outside
            [0, 1], or a number of tokens that is not positive.
    """
    try:
        a, t = np.asarray(accuracies, float), np.asarray(tokens, float)
    except (TypeError, ValueError):
        raise InputError("accuracies or tokens are no table of numbers; give as many levels of each question") from None
    if a.shape != t.shape:
        raise InputError(f"accuracies have the shape {a.shape}, tokens {t.shape}; give one of each, in the same order")
    if a.ndim != 2 or a.shape[0] < 1 or a.shape[1] < 2:
        raise InputError(f"accuracies have the shape {a.shape}; give (questions, levels) with at least 2 levels")
    for name, value, good, allowed in (
        ("accuracy", a, (a >= 0) & (a <= 1), "numbers in [0, 1]"),
        ("tokens", t, (t > 0) & np.isfinite(t), "finite numbers > 0"),
    ):
        if not good.all():
            i, j = np.argwhere(~good)[0]
            raise InputError(
                f"{name}={value[i, j]:g} of question {i + 1} at level {j + 1} is not allowed; give {allowed}"
            )
    means = t.mean(0)
    if (np.diff(means) <= 0).any():
        logger.warning(f"mean tokens do not grow with the level: {', '.join(f'{m:.4g}' for m in means)}")
    return a, t
