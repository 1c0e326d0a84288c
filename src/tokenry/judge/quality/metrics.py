"""How well an estimator's tags and scores agree with the true ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ...core.calibration import spearman
from ...core.errors import InputError

__all__ = ["mcc", "qe_metrics"]


def mcc(tp: float, fp: float, fn: float, tn: float) -> float:
    """Matthews' correlation coefficient of counts; 0 where one of the sums below the root is 0."""
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    return (tp * tn - fp * fn) / root if root else 0.0


def qe_metrics(
    tags: Sequence[bool], found: Sequence[bool], scores: Sequence[float], estimated: Sequence[float]
) -> dict[str, float]:
    """Of words and of sentences.

    Args:
        tags: which words are wrong, of all sentences one after the other; `found`: which the estimator says are.
        scores: of the sentences; `estimated`: what the estimator says.

    Returns:
        `mcc`, `f1_bad`, `f1_ok` and `f1_mult`, their product, of words; `spearman` and `pearson` of sentences, NaN
        where one side is constant.

    Raises:
        InputError: none, or unequal numbers, of words or sentences.
    """
    for name, first, second in (("words", tags, found), ("sentences", scores, estimated)):
        if len(first) != len(second) or not len(first):
            raise InputError(f"{len(first)} {name} and {len(second)} estimates are given; give one for each, and some")
    true, said = np.asarray(tags, bool), np.asarray(found, bool)
    tp, fp, fn, tn = (int((a & b).sum()) for a, b in ((true, said), (~true, said), (true, ~said), (~true, ~said)))
    bad, ok = _f1(tp, fp, fn), _f1(tn, fn, fp)
    words = {"mcc": mcc(tp, fp, fn, tn), "f1_bad": bad, "f1_ok": ok, "f1_mult": bad * ok}
    return {**words, "spearman": spearman(scores, estimated), "pearson": _pearson(scores, estimated)}


def _f1(hits: int, false: int, missed: int) -> float:
    return 2 * hits / (2 * hits + false + missed) if hits else 0.0


def _pearson(first: Sequence[float], second: Sequence[float]) -> float:
    a, b = np.asarray(first, float), np.asarray(second, float)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else float("nan")
