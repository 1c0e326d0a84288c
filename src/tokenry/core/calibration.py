"""How well a score tells right from wrong, how well a probability is one, and how well two scores agree."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from .errors import InputError

__all__ = ["auroc", "brier", "expected_calibration_error", "spearman"]


def auroc(scores: ArrayLike, correct: ArrayLike) -> float:
    """Probability that a right one scores above a wrong one, equal scores counted half; NaN without both."""
    values, right = np.asarray(scores, float), np.asarray(correct, bool)
    if right.all() or not right.any():
        return float("nan")
    wrong = np.sort(values[~right])
    below = np.searchsorted(wrong, values[right], "left") + np.searchsorted(wrong, values[right], "right")
    return float(below.mean() / 2 / len(wrong))


def brier(probabilities: ArrayLike, correct: ArrayLike) -> float:
    """Mean squared distance of probabilities from what happened, 0 to 1 (Brier 1950)."""
    values, right = _checked(probabilities, correct)
    return float(np.mean((values - right) ** 2))


def expected_calibration_error(probabilities: ArrayLike, correct: ArrayLike, bins: int = 20) -> float:
    """Mean distance between confidence and accuracy over equal bins, weighted by their size (Guo et al. 2017, eq. 3).

    A probability on the border of two bins belongs to the lower one, 0 to the first.
    """
    if bins < 1:
        raise InputError(f"bins={bins} is not allowed; give a number >= 1")
    values, right = _checked(probabilities, correct)
    place = np.clip(np.ceil(values * bins).astype(int) - 1, 0, bins - 1)
    gap = np.bincount(place, values - right, bins)
    return float(np.abs(gap).sum() / len(right))


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Rank correlation, ties at their mean rank; NaN where either side is constant."""
    a, b = _ranks(np.asarray(first, float)), _ranks(np.asarray(second, float))
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _checked(probabilities: ArrayLike, correct: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    values, right = np.asarray(probabilities, float), np.asarray(correct, float)
    if values.shape != right.shape or values.ndim != 1 or not len(values):
        raise InputError(f"{values.shape} probabilities for {right.shape} outcomes; give one for each, at least one")
    if not ((values >= 0) & (values <= 1)).all():
        raise InputError(f"probabilities from {values.min():g} to {values.max():g} are not allowed; give 0 to 1")
    return values, right
