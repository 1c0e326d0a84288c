"""What was found: numbers, checks made from them, findings, and the verdict.

A check has three outcomes by its interval: it holds, it fails, or it is undecided, which it always is by a handful of
samples. Its text is made from the check itself, so that words and condition cannot disagree. Equality is never
concluded from an interval that merely contains 0: what must not change has a margin, see `within` and `loses_at_most`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .statistics import Interval, bootstrap_statistic

__all__ = [
    "VERDICTS",
    "Check",
    "Contrast",
    "Finding",
    "above",
    "all_of",
    "any_of",
    "at_least",
    "at_most",
    "below",
    "describe",
    "exactly",
    "loses_at_most",
    "share",
    "verdict",
    "within",
]

Decision = Literal["holds", "fails", "undecided"]
VERDICTS = ("reproduced", "partly", "not reproduced", "undecided")
TWICE = 2  # margins that the interval of what is within one margin may reach
UNITS = 6  # samples that decide at least: that five fair coins fall the same way happens in one of sixteen cases


@dataclass(frozen=True)
class Contrast:
    """A number with its 95 % interval, what it is, and how it is written."""

    interval: Interval
    what: str
    form: str = ".3f"

    @property
    def exact(self) -> bool:
        """Whether it has no interval. That of several samples which all say the same is a point, too, and yet no more
        than what these samples say."""
        return self.interval.n == 1 and self.interval.low == self.interval.high

    @property
    def shown(self) -> str:
        """The number alone; what has no interval (a count, a maximum) without brackets."""
        mean, low, high, _ = self.interval
        return f"{mean:{self.form}}" if mean == low == high else f"{self.interval:{self.form}}"

    def __str__(self) -> str:
        return f"{self.what}: {self.shown}"

    def bound(self, value: float) -> str:
        """A bound, written as the number is."""
        return f"{value:.4g}" if "%" not in self.form else f"{100 * value:.4g}%"


def exactly(value: float, what: str, form: str = "g") -> Contrast:
    """A number without an interval: a count, a maximum, a p value."""
    return Contrast(Interval(float(value), float(value), float(value), 1), what, form)


def share(right: np.ndarray, what: str) -> Contrast:
    """A share, or another mean, with its interval over what was counted, as percent."""
    return Contrast(bootstrap_statistic(lambda pick: float(right[pick].mean()), len(right)), what, ".1%")


# --- checks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """Whether a number is as asked.

    Attributes:
        text: the numbers, what is asked of them, and the outcome of each.
        number: the one that a ledger shows: of several the first that the outcome hangs on.
    """

    outcome: Decision
    text: str
    number: Contrast


def above(x: Contrast, bound: float) -> Check:
    return _check(x, f"above {x.bound(bound)}", x.interval.low > bound, x.interval.high < bound)


def below(x: Contrast, bound: float) -> Check:
    return _check(x, f"below {x.bound(bound)}", x.interval.high < bound, x.interval.low > bound)


def at_least(x: Contrast, bound: float) -> Check:
    return _check(x, f"at least {x.bound(bound)}", x.interval.low >= bound, x.interval.high < bound)


def at_most(x: Contrast, bound: float) -> Check:
    return _check(x, f"at most {x.bound(bound)}", x.interval.high <= bound, x.interval.low > bound)


def within(x: Contrast, margin: float) -> Check:
    """Nothing changes: the number is within the margin, and its interval within twice the margin.

    It fails where the whole interval is beyond the margin.
    """
    mean, low, high, _ = x.interval
    holds = abs(mean) <= margin and max(-low, high) <= TWICE * margin
    return _check(x, f"within {x.bound(margin)}", holds, low > margin or high < -margin)


def loses_at_most(x: Contrast, margin: float) -> Check:
    """`within`, where a gain is welcome."""
    mean, low, high, _ = x.interval
    holds = mean >= -margin and low >= -TWICE * margin
    return _check(x, f"loses at most {x.bound(margin)}", holds, high < -margin)


def _check(x: Contrast, asked: str, holds: bool, fails: bool) -> Check:
    mean, low, _, n = x.interval
    few = n < UNITS and not x.exact
    unknown = few or math.isnan(mean) or math.isnan(low)
    outcome: Decision = "undecided" if unknown else "holds" if holds else "fails" if fails or x.exact else "undecided"
    return Check(outcome, f"{x} ({asked}: {outcome}{f', {n} samples' if few else ''})", x)


def all_of(*checks: Check) -> Check:
    """Holds if all do, fails if one does."""
    outcomes = {check.outcome for check in checks}
    outcome: Decision = "fails" if "fails" in outcomes else "undecided" if "undecided" in outcomes else "holds"
    return Check(outcome, "; ".join(check.text for check in checks), _deciding(outcome, checks))


def any_of(*checks: Check) -> Check:
    """Holds if one does, fails if all do."""
    outcomes = {check.outcome for check in checks}
    outcome: Decision = "holds" if "holds" in outcomes else "undecided" if "undecided" in outcomes else "fails"
    parts = [f"({check.text})" if "; " in check.text else check.text for check in checks]
    return Check(outcome, " or ".join(parts), _deciding(outcome, checks))


def _deciding(outcome: Decision, checks: Sequence[Check]) -> Contrast:
    """The number of the first check that came out as all of them together."""
    return next(check.number for check in checks if check.outcome == outcome)


# --- findings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One sentence of the claim and the check that decides it.

    Attributes:
        check: None where a finding only describes; it is then not counted.
        main: whether it is the claim itself. An experiment has one that is.
        note: further numbers for the reader, which decide nothing.
    """

    statement: str
    check: Check | None
    main: bool = False
    note: str = ""

    @property
    def outcome(self) -> str:
        return self.check.outcome if self.check else "described"

    @property
    def holds(self) -> bool:
        return self.outcome == "holds"

    @property
    def numbers(self) -> str:
        """All numbers of the finding, as text."""
        return "; ".join(part for part in (self.check.text if self.check else "", self.note) if part)


def describe(statement: str, text: str) -> Finding:
    """Numbers that decide nothing and are not counted."""
    return Finding(statement, None, note=text)


def verdict(findings: Sequence[Finding]) -> str:
    """`reproduced` if every deciding finding holds, `partly` if the main one does, `not reproduced` if that fails, and
    `undecided` where its interval is on both sides of the bound. The order of the findings does not matter."""
    main = [finding for finding in findings if finding.main and finding.check]
    if len(main) != 1:
        raise ValueError(f"an experiment has one main finding that decides, not {len(main)}")
    return verdict_of(main[0].outcome, [finding.outcome for finding in findings if finding.check])


def verdict_of(main: str, outcomes: Sequence[str]) -> str:
    """The verdict from the outcome of the main finding, and those of all that decide."""
    if main == "holds":
        return "reproduced" if all(outcome == "holds" for outcome in outcomes) else "partly"
    return "not reproduced" if main == "fails" else "undecided"
