"""Analogies of countries, capitals and currencies: "paris : france = rome : italy"."""

from __future__ import annotations

import random
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, cast

from ..core.errors import InputError
from ..core.files import parse_json

__all__ = ["Facts", "Words", "analogies", "country_facts", "draw_analogies"]

Words = tuple[str, str, str, str]
Facts = tuple[str, str, str]  # country, capital, currency
RELATIONS = ((0, 1), (0, 2), (1, 2))  # columns of the facts; each in both directions


def country_facts() -> list[Facts]:
    """Those that come with tokenry."""
    table: Any = parse_json(files("tokenry.data").joinpath("countries.json").read_text("utf-8"))
    return [cast(Facts, tuple(row)) for row in table["rows"]]


def analogies(facts: Sequence[Facts]) -> list[Words]:
    """Every two rows in every relation and direction."""
    ways = [way for x, y in RELATIONS for way in ((x, y), (y, x))]
    return [(r[p], r[q], s[p], s[q]) for p, q in ways for r in facts for s in facts if r is not s]


def draw_analogies(count: int) -> list[Words]:
    """So many analogies of `country_facts`, always the same ones.

    Raises:
        InputError: fewer than 2, or more than there are.
    """
    every = analogies(country_facts())
    if not 2 <= count <= len(every):
        raise InputError(f"{count} analogies are not allowed; give 2 to {len(every)}")
    return random.Random(0).sample(every, count)
