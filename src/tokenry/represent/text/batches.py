"""Texts in batches of like length, and their vectors in the order that was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.errors import InputError
from ...core.progress import Progress

__all__ = ["by_length", "check_sentences"]


def check_sentences(sentences: Any, batch_size: int) -> None:
    """Refuse what is no list of texts, and a batch size below 1."""
    if isinstance(sentences, str | Mapping | Tensor) or not len(sentences):
        raise InputError(f"sentences={sentences!r} is no list of texts; give a list with at least one")
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} is not allowed; give a number >= 1")


def by_length(
    lengths: Sequence[int],
    batch_size: int,
    embed: Callable[[list[int]], Tensor],
    progress: Progress | None = None,
    tokens: int | None = None,
) -> Tensor:
    """(texts, ...) from `embed`, which is given the places of a batch; the longest first, as like lengths need little
    padding.

    Args:
        progress: gets (done, all) after a batch.
        tokens: of a batch at most, with the padding; one text may have more.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    made: list[Tensor] = []
    done = 0
    for batch in _batches(order, lengths, batch_size, tokens):
        made.append(embed(batch))
        done += len(batch)
        if progress:
            progress(done, len(order))
    back = torch.empty(len(order), dtype=torch.long)
    back[order] = torch.arange(len(order))
    return torch.cat(made)[back]


def _batches(order: list[int], lengths: Sequence[int], most: int, tokens: int | None) -> Iterator[list[int]]:
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        count = most if tokens is None else max(1, min(most, tokens // longest))
        yield order[start : start + count]
        start += count
