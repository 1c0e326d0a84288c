"""How often to run a question at a level: as long as its results vary, and by shares of a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from annotated_types import Ge, Gt, Le

from ...core.errors import InputError
from ...core.fields import Count, check, require

__all__ = ["AdaptiveSampler", "Cell", "allocate_budget", "variation"]

Threshold = Annotated[float, Ge(0), Le(10**9)]
Small = Annotated[float, Gt(0), Le(1)]
EPSILON = 1e-8


def variation(values: Sequence[float], epsilon: float = EPSILON) -> float:
    """The coefficient of variation: population standard deviation over the mean; 0 for fewer than two values."""
    return 0.0 if len(values) < 2 else float(np.std(values) / (np.mean(values) + epsilon))


class Cell(NamedTuple):
    """The runs of one question at one level, and the means that are scored."""

    accuracy: float
    tokens: float
    runs: list[tuple[float, float]]


@dataclass(frozen=True)
class AdaptiveSampler:
    """Runs a question at a level until its results vary little.

    Attributes:
        m_min: runs at least; `m_max`: at most.
        threshold: one more run as long as the coefficients of variation of accuracy and tokens sum to more than this.
        epsilon: added to the means that deviations are divided by.
        final: runs that are drawn once sampling has stopped, and alone are averaged: when to stop depends on the
            results, so that the mean of these very results is slightly biased. 0 averages all runs.
    """

    m_min: int = 3
    m_max: int = 10
    threshold: float = 0.5
    epsilon: float = EPSILON
    final: int = 0

    def __post_init__(self) -> None:
        _check_bounds(self.m_min, self.m_max)
        check("threshold", self.threshold, Threshold)
        check("epsilon", self.epsilon, Small)
        check("final", self.final + 1 if isinstance(self.final, int) else self.final, Count)

    def run(self, fn: Callable[[], tuple[float, float]]) -> Cell:
        """The runs of one cell.

        Args:
            fn: generates and checks one answer; gives its accuracy in [0, 1] and its tokens.

        Raises:
            InputError: an accuracy outside [0, 1], or tokens that are not positive.
        """
        runs = [_once(fn) for _ in range(self.m_min)]
        while len(runs) < self.m_max and self._combined(runs) > self.threshold:
            runs.append(_once(fn))
        last = [_once(fn) for _ in range(self.final)]
        accuracy, tokens = np.mean(last or runs, axis=0)
        return Cell(float(accuracy), float(tokens), runs + last)

    def _combined(self, runs: Sequence[tuple[float, float]]) -> float:
        return sum(variation(values, self.epsilon) for values in zip(*runs))


def _once(fn: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    accuracy, tokens = map(float, fn())
    require(0 <= accuracy <= 1, "accuracy", accuracy, "the share of right answers, in [0, 1]")
    require(tokens > 0, "tokens", tokens, "the generated tokens, a finite number > 0")
    return accuracy, tokens


def allocate_budget(cvs: Sequence[float] | np.ndarray, total: int, m_min: int = 3, m_max: int = 10) -> list[int]:
    """Runs of each cell from a budget: `m_min` each, the rest by shares of their variation, at most `m_max`.

    What is left by rounding down and by the limit is not given out. With a budget of less than `m_min` a cell, all get
    `m_min` nevertheless.

    Args:
        cvs: the sum of the coefficients of variation of each cell's accuracy and tokens.

    Raises:
        InputError: no cells, a variation below 0 or not finite, or a budget that is no count.
    """
    _check_bounds(m_min, m_max)
    check("total", total, Count)
    shares = np.asarray(cvs, float)
    if shares.ndim != 1 or not len(shares):
        raise InputError(f"cvs have the shape {shares.shape}; give the variation of each cell, in one list")
    require(shares >= 0, "cvs", shares, "finite numbers >= 0")
    left, whole = total - m_min * len(shares), shares.sum()
    if left <= 0 or whole == 0:
        return [m_min] * len(shares)
    return [min(m_max, m_min + int(left * (share / whole))) for share in shares]


def _check_bounds(m_min: int, m_max: int) -> None:
    check("m_min", m_min, Count)
    check("m_max", m_max, Count)
    if m_min > m_max:
        raise InputError(f"m_min={m_min} is above m_max={m_max}; give 1 <= m_min <= m_max")
