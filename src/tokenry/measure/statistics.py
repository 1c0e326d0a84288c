"""Paired differences with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

__all__ = ["Interval", "bootstrap_statistic", "paired_bootstrap"]


class Interval(NamedTuple):
    """A mean with its 95 % interval over `n` pairs."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def map(self, function: Callable[[float], float]) -> Interval:
        """The interval of a growing function of the number."""
        return Interval(function(self.mean), function(self.low), function(self.high), self.n)

    def __format__(self, form: str) -> str:
        """f"{interval:.3f}" is "mean [low, high]", each in this format."""
        if not form:
            return str(self)
        return f"{self.mean:{form}} [{self.low:{form}}, {self.high:{form}}]"


def paired_bootstrap(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of first - second over pairs, with the percentile bootstrap interval (95 %).

    Pairs with a missing value (NaN) on either side are left out. One pair gives an infinite interval.
    """
    a, b = np.asarray(first, float), np.asarray(second, float)
    if a.shape != b.shape:
        raise ValueError(f"paired_bootstrap needs pairs, got {a.size} and {b.size} values")
    difference = (a - b)[~np.isnan(a - b)]
    n = difference.size
    if n == 0:
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    mean = float(difference.mean())
    if n == 1:
        return Interval(mean, float("-inf"), float("inf"), 1)
    picks = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    low, high = np.percentile(difference[picks].mean(1), [2.5, 97.5])
    return Interval(mean, float(low), float(high), n)


def bootstrap_statistic(
    compute: Callable[[np.ndarray], float], samples: int, resamples: int = 1000, seed: int = 0
) -> Interval:
    """A number over `samples` samples, with the percentile bootstrap interval (95 %) over them.

    Args:
        compute: the number for the samples with these indices (n,); resampled indices repeat.
    """
    value = compute(np.arange(samples))
    if samples < 2:
        return Interval(value, float("-inf"), float("inf"), samples)
    picks = np.random.default_rng(seed).integers(0, samples, size=(resamples, samples))
    found = np.array([compute(pick) for pick in picks])
    found = found[~np.isnan(found)]
    if found.size == 0:
        return Interval(value, float("nan"), float("nan"), samples)
    low, high = np.percentile(found, [2.5, 97.5])
    return Interval(value, float(low), float(high), samples)
