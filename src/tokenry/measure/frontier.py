"""Quality against cost: what several settings of a method reach, and what the same quality costs another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .statistics import Interval, bootstrap_statistic

__all__ = ["cost_at", "cost_ratio"]

LEVELS = 11  # qualities at which two frontiers are compared
Tables = Sequence[Mapping[str, np.ndarray]]  # of each setting: {metric or cost: (samples, seeds)}


def cost_at(points: Sequence[tuple[float, float]], levels: np.ndarray) -> np.ndarray:
    """What each quality costs on the frontier of points (cost, quality), on straight lines between them.

    The frontier are the points that are better than every cheaper one. NaN outside its range.
    """
    kept: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda p: (p[0], -p[1])):
        if not kept or quality > kept[-1][1]:
            kept.append((cost, quality))
    costs, qualities = np.array(kept).T
    return np.interp(levels, qualities, costs, left=np.nan, right=np.nan)


def cost_ratio(
    first: Tables,
    second: Tables,
    cost: str,
    quality: str,
    samples: int,
    least: Callable[[np.ndarray], float] | None = None,
) -> Interval:
    """How much more `first` costs than `second` at equal quality: a ratio, with its 95 % interval.

    Each group of settings is a frontier. The ratio is the geometric mean over qualities that both reach, evenly spread
    from the higher of their lowest to the lower of their highest one. The interval is over resampled samples, the same
    for all; NaN where the frontiers have no quality in common.

    Args:
        least: the lowest quality that counts, for samples with these indices.
    """

    def compute(pick: np.ndarray) -> float:
        one, other = ([_point(table, pick, cost, quality) for table in group] for group in (first, second))
        return _ratio(one, other, -np.inf if least is None else least(pick))

    return bootstrap_statistic(compute, samples)


def _point(table: Mapping[str, np.ndarray], pick: np.ndarray, cost: str, quality: str) -> tuple[float, float]:
    values, costs = table[quality][pick], table[cost][pick]
    measured = ~np.isnan(values)  # samples without this quality have no cost to compare either
    return (float(np.nanmean(costs[measured])), float(values[measured].mean())) if measured.any() else (np.nan, np.nan)


def _ratio(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]], least: float) -> float:
    # The quality of the cheapest point is the lowest one that a frontier reaches.
    low = max(least, *(min(points, key=lambda p: (p[0], -p[1]))[1] for points in (first, second)))
    high = min(max(quality for _, quality in points) for points in (first, second))
    if high < low:
        return float("nan")
    levels = np.linspace(low, high, LEVELS)
    return float(np.exp(np.mean(np.log(cost_at(first, levels) / cost_at(second, levels)))))
