"""Calibration against loops over the definitions."""

import math
import random

import pytest

from tokenry.core.calibration import auroc, brier, expected_calibration_error
from tokenry.core.errors import InputError


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definitions(seed):
    rng = random.Random(seed)
    p = [rng.choice([0.0, 0.05, 0.25, 1.0, rng.random()]) for _ in range(60)]
    right = [rng.random() < x for x in p]
    pairs = [(a > b) + 0.5 * (a == b) for a, x in zip(p, right) if x for b, y in zip(p, right) if not y]
    assert auroc(p, right) == pytest.approx(sum(pairs) / len(pairs))
    assert brier(p, right) == pytest.approx(sum((a - x) ** 2 for a, x in zip(p, right)) / 60)
    error = 0.0
    for b in range(20):
        inside = [(a, x) for a, x in zip(p, right) if b / 20 < a <= (b + 1) / 20 or (b == 0 and a == 0)]
        if inside:
            confidence, accuracy = (sum(v) / len(inside) for v in zip(*inside))
            error += len(inside) / 60 * abs(confidence - accuracy)
    assert expected_calibration_error(p, right) == pytest.approx(error)


def test_extremes():
    assert expected_calibration_error([1.0, 0.0], [True, False]) == brier([1.0, 0.0], [True, False]) == 0
    assert expected_calibration_error([1.0, 1.0], [False, False]) == 1
    assert math.isnan(auroc([0.1, 0.2], [True, True]))


@pytest.mark.parametrize("call", [brier, expected_calibration_error])
@pytest.mark.parametrize("given", [([0.5], [True, False]), ([], []), ([1.1], [True]), ([float("nan")], [True])])
def test_refuses(call, given):
    with pytest.raises(InputError, match="give"):
        call(*given)


def test_refuses_no_bins():
    with pytest.raises(InputError, match="bins=0"):
        expected_calibration_error([0.5], [True], 0)
