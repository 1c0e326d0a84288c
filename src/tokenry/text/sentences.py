"""Sentences of a chain of thought, cut as in "Thought Anchors" (arXiv 2506.19143), with their characters and tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from ..core.errors import InputError

__all__ = ["Sentence", "check_spans", "locate_sentences", "split_sentences", "thought"]

SHORT = 10  # characters; a shorter piece belongs to the next one
OPEN, CLOSE = "<think>", "</think>"
CUT = re.compile(r"(?<=[.?!])(?=[ \n])|\n[ \t]*\n")


class Sentence(NamedTuple):
    """Half-open ranges of tokens (`start`, `stop`) and of characters (`first`, `last`), and what is written there."""

    start: int
    stop: int
    first: int
    last: int
    text: str


def thought(text: str, begin: int = 0) -> tuple[int, int]:
    """The characters between the think tags after `begin`, or all from there on."""
    opened = text.find(OPEN, begin)
    first = opened + len(OPEN) if opened >= 0 else begin
    closed = text.find(CLOSE, first)
    return first, closed if closed >= 0 else len(text)


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Half-open character ranges, cut behind `.`, `?` and `!` before a space or a line's end, and at blank lines.

    A piece of fewer than ten characters is one with the next, at the end with the one before. A last piece without a
    full stop counts, which the official code drops.
    """
    cuts = [0, *(match.end() for match in CUT.finditer(text)), len(text)]
    pieces = []
    for start, stop in pairwise(cuts):
        piece = text[start:stop]
        if piece.strip():
            pieces.append((start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())))
    merged: list[tuple[int, int]] = []
    waiting: int | None = None  # where a short piece began that waits for the next
    for start, stop in pieces:
        begin = start if waiting is None else waiting
        waiting = begin if stop - begin < SHORT else None
        if waiting is None:
            merged.append((begin, stop))
    if waiting is not None:
        merged[-1:] = [((merged[-1][0] if merged else waiting), pieces[-1][1])]
    return merged


def locate_sentences(text: str, offsets: Tensor, begin: int, end: int) -> list[Sentence]:
    """The sentences of `text[begin:end]` with their tokens.

    A token on both sides of a cut belongs to the earlier sentence; tokens of white space between two belong to none.

    Args:
        offsets: (time, 2) characters of each token.
    """
    found: list[Sentence] = []
    starts, ends = offsets[:, 0].tolist(), offsets[:, 1].tolist()
    token = 0
    for first, last in ((a + begin, b + begin) for a, b in split_sentences(text[begin:end])):
        while token < len(ends) and ends[token] <= first:
            token += 1
        start = token
        while token < len(starts) and starts[token] < last:
            token += 1
        if start < token:
            found.append(Sentence(start, token, first, last, text[first:last]))
    return found


def check_spans(spans: Sequence[tuple[int, int]], total: int) -> None:
    """Refuse token ranges that are empty, overlap, are not in order, or lie outside the tokens.

    Raises:
        InputError: the first such range.
    """
    before = 0
    for start, stop in spans:
        if not 0 <= start < stop <= total:
            raise InputError(f"the range ({start}, {stop}) is empty or outside the {total} tokens; give start < stop")
        if start < before:
            raise InputError(f"the range ({start}, {stop}) overlaps the one before, which ends at {before}; order them")
        before = stop
