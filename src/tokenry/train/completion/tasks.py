"""What the three tasks learn from: windows of values, of types, and of values with the rest of each statement to fill.

Attention is causal, so one window teaches the tails of all its statements, each behind the text that stands left of it.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from ...core.errors import InputError
from ...text.code.lexer import EOS, statements
from ...text.code.views import CodeViews
from .vocabulary import TYPE_IDS, encode_values

__all__ = ["TASKS", "Example", "examples_of", "statement_completion_examples", "statement_tails"]

TASKS = ("ttp", "tvp", "sc")  # token types, token values, completion of statements
IGNORED = -100
SHORTEST = 2  # tokens of a window: one is read, one is predicted


class Example(TypedDict):
    """A window for a task; labels of -100 are not learned."""

    task: str
    input_ids: list[int]
    labels: list[int]


def examples_of(
    views: CodeViews, tokenizer: PreTrainedTokenizerBase, tasks: Collection[str], max_length: int, seed: int
) -> Iterator[Example]:
    """The windows of a program for some of the `TASKS`."""
    if "ttp" in tasks:
        types = [TYPE_IDS[name] for name in views.types]
        yield from _windows("ttp", types, types, max_length)
    if "tvp" in tasks:
        ids = [i for word in encode_values(tokenizer, views.values) for i in word]
        yield from _windows("tvp", ids, ids, max_length)
    if "sc" in tasks:
        yield from statement_completion_examples(views, tokenizer, seed, max_length)


def statement_completion_examples(
    views: CodeViews, tokenizer: PreTrainedTokenizerBase, seed: int, max_length: int = 512
) -> list[Example]:
    """Windows in which each statement is to be completed from a random cut on, up to and with the mark of its end.

    Raises:
        InputError: a program without the end of a statement.
    """
    if EOS not in views.values:
        raise InputError(f"the program has no {EOS}, so no statement to complete; make its views with code_views")
    tail = set(statement_tails(views.values, random.Random(seed)))
    words = encode_values(tokenizer, views.values)
    ids = [i for word in words for i in word]
    labels = [i if n in tail else IGNORED for n, word in enumerate(words) for i in word]
    return list(_windows("sc", ids, labels, max_length))


def statement_tails(values: tuple[str, ...], rng: random.Random) -> Iterator[int]:
    """The places of values behind the cut of their statement. A cut is any place behind the first value that leaves at
    least two values; shorter statements are never cut."""
    for first, end in statements(values):
        if end - first > 2:
            yield from range(rng.randrange(first + 1, end - 1), end)


def _windows(task: str, ids: Sequence[int], labels: Sequence[int], size: int) -> Iterator[Example]:
    for start in range(0, len(ids), size):
        part, goal = list(ids[start : start + size]), list(labels[start : start + size])
        if len(part) >= SHORTEST and any(label != IGNORED for label in goal[1:]):
            yield Example(task=task, input_ids=part, labels=goal)
