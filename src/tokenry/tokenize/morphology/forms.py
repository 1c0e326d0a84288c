"""Which form of a morpheme stands in a word: chosen from the letters before it and behind it, as harmony asks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["REACH", "Choice", "choices", "harmonize"]

REACH = 16  # letters before a form that are looked at


class Side(NamedTuple):
    """What a form asks of the letters around it; None asks for nothing."""

    after: re.Pattern[str] | None
    stems: frozenset[str]
    before: re.Pattern[str] | None

    def fits(self, left: str, behind: str) -> bool:
        return self.follows(left) and self.precedes(behind)

    def follows(self, left: str) -> bool:
        return self.after is None or self.after.search(left) is not None or left in self.stems

    def precedes(self, behind: str) -> bool:
        return self.before is None or self.before.match(behind) is not None


class Choice(NamedTuple):
    """The forms of a morpheme, and in which order they are tried: those that ask most come first.

    Attributes:
        tried: (form, what it asks for); one that asks for nothing ends the list.
    """

    forms: tuple[str, ...]
    tried: tuple[tuple[str, tuple[Side, ...]], ...]


def choices(contexts: Mapping[str, Any], rules: Mapping[str, Any]) -> dict[str, list[tuple[Side, ...]]]:
    """{rule: what each of its forms asks for, compiled}."""
    sides = {name: _side(**given) for name, given in contexts.items()}
    return {rule: [tuple(sides[name] for name in form) for form in forms] for rule, forms in rules.items()}


def _side(after: str | None = None, stems: Sequence[str] = (), before: str | None = None) -> Side:
    never = r"(?!)" if stems else None
    pattern = never if after is None else after
    return Side(
        None if pattern is None else re.compile(pattern),
        frozenset(stems),
        None if before is None else re.compile(before),
    )


def choice(forms: tuple[str, ...], asked: Sequence[tuple[Side, ...]]) -> Choice:
    """The choice among forms; without a rule the first one always stands."""
    pairs = list(zip(forms, asked)) or [(forms[0], ())]
    ordered = sorted(pairs, key=lambda pair: -len(pair[1]))  # stable: of equals the first one
    return Choice(forms, (*ordered, (forms[0], ())))


def harmonize(before: str, choice: Choice, behind: str) -> str:
    """The form that stands after the letters `before`, followed by a piece whose first form is `behind`.

    Args:
        before: lower-case letters of the word so far; the last 16 count.
        behind: empty at the end of a word.
    """
    left = before[-REACH:]
    return next(form for form, asked in choice.tried if all(side.fits(left, behind) for side in asked))
