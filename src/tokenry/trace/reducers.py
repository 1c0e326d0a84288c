"""Reducers: what to keep of attention maps that are too large to keep.

A reducer gets one sequence's attention in chunks of rows while the model runs, and keeps a small summary per layer:

    update(layer, first_row, first_key, rows)    # rows (heads, n, k), float32
    result() -> {name: tensor with layers in front}

Row i of a chunk is token `first_row + i`, column j token `first_key + j` (a sliding window drops the first keys).
`capture` gives each sequence its own copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..core.errors import InputError

__all__ = ["Entropy", "Reducer", "SentenceMean", "TopKeys"]


class Reducer(Protocol):
    """See the module's text."""

    def update(self, layer: int, first_row: int, first_key: int, rows: Tensor) -> None: ...

    def result(self) -> dict[str, Tensor]: ...


class SentenceMean:
    """Mean attention from the tokens of one span to those of another: "sentence_mean" (layers, heads, n, n).

    Every pair (token of span i, token of span j) counts once, the zeros above the diagonal included.

    Args:
        spans: half-open token spans, for example `Trace.spans["sentences"]`.
    """

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        for start, stop in spans:
            if not 0 <= start < stop:
                raise InputError(f"the span ({start}, {stop}) is empty; give (start, stop) with 0 <= start < stop")
        self.spans = torch.tensor(spans).reshape(-1, 2)
        self.sums: dict[int, Tensor] = {}

    def update(self, layer: int, first_row: int, first_key: int, rows: Tensor) -> None:
        from_span = self._members(first_row, rows.shape[1], rows)
        to_span = self._members(first_key, rows.shape[2], rows)
        block = from_span @ rows @ to_span.T
        self.sums[layer] = self.sums[layer] + block if layer in self.sums else block

    def result(self) -> dict[str, Tensor]:
        lengths = (self.spans[:, 1] - self.spans[:, 0]).float()
        sums = torch.stack([self.sums[layer] for layer in sorted(self.sums)]).cpu()
        return {"sentence_mean": sums / (lengths[:, None] * lengths)}

    def _members(self, first: int, count: int, like: Tensor) -> Tensor:
        """(spans, count): 1 where token `first + i` lies in the span."""
        tokens = torch.arange(first, first + count)
        inside = (tokens >= self.spans[:, :1]) & (tokens < self.spans[:, 1:])
        return inside.to(like.device, like.dtype)


class TopKeys:
    """The m keys a row attends to most, best first: "top_keys" and "top_weights" (layers, heads, time, m).

    A row with fewer than m keys is filled up with key -1 and weight 0.
    """

    def __init__(self, m: int) -> None:
        if m < 1:
            raise InputError(f"m={m} is not allowed; give a number of keys >= 1")
        self.m = m
        self.parts: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def update(self, layer: int, first_row: int, first_key: int, rows: Tensor) -> None:
        weights, keys = rows.topk(min(self.m, rows.shape[2]), dim=-1)
        keys = torch.where(weights > 0, keys + first_key, -1)
        missing = (0, self.m - keys.shape[-1])
        pad = torch.nn.functional.pad
        self.parts.setdefault(layer, []).append((pad(keys, missing, value=-1), pad(weights, missing)))

    def result(self) -> dict[str, Tensor]:
        columns = [[torch.cat(part, 1) for part in zip(*self.parts[layer])] for layer in sorted(self.parts)]
        keys, weights = (torch.stack(column).cpu() for column in zip(*columns))
        return {"top_keys": keys, "top_weights": weights}


class Entropy:
    """Entropy of every attention row in nats: "attention_entropy" (layers, heads, time)."""

    def __init__(self) -> None:
        self.parts: dict[int, list[Tensor]] = {}

    def update(self, layer: int, first_row: int, first_key: int, rows: Tensor) -> None:
        self.parts.setdefault(layer, []).append(torch.special.entr(rows).sum(-1))

    def result(self) -> dict[str, Tensor]:
        return {"attention_entropy": torch.stack([torch.cat(self.parts[i], 1) for i in sorted(self.parts)]).cpu()}
