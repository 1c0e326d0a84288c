"""Reducers: what to keep of attention maps that are too large to keep.

A reducer gets one sequence's attention in chunks of rows while the model runs, and keeps a small summary per layer:

    update(layer, first_row, first_key, rows)    # rows (heads, n, k), float32
    result() -> {name: tensor with layers in front}

Row i of a chunk is token `first_row + i`, column j token `first_key + j` (a sliding window drops the first keys, and
those behind the last row of a chunk are left out where a layer is plainly causal). `capture` gives each sequence its
own copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..core.errors import InputError

__all__ = ["Entropy", "LowEntropyRows", "Reducer", "SentenceMean", "TopKeys"]


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
        heads, new, keys = rows.shape
        # a chunk has rows of a few spans, so that their sums are small before keys are summed
        here = (self.spans[:, 0] < first_row + new) & (self.spans[:, 1] > first_row)
        if layer not in self.sums:
            self.sums[layer] = rows.new_zeros(heads, len(self.spans), len(self.spans))
        from_span, to_span = self._members(first_row, new, rows)[here], self._members(first_key, keys, rows)
        self.sums[layer][:, here] += from_span @ rows @ to_span.T

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


# What is left of a key 1, 2, ... 10 tokens before the row (Li et al. 2025, their published code).
NEAR = torch.tensor(
    [
        *(0.16644488, 0.20938152, 0.32959151, 0.46061748, 0.59304059),
        *(0.67549127, 0.73914525, 0.81274293, 0.87378443, 0.93925344),
    ]
)


def without_habits(rows: Tensor, first_row: int) -> Tensor:
    """Attention rows (heads, n, keys) without what every row does: itself and the first key are 0, near keys damped.

    The sums are 1 again, or 0 where nothing was left. Key j is token j.
    """
    token = torch.arange(first_row, first_row + rows.shape[1], device=rows.device)[:, None]
    distance = token - torch.arange(rows.shape[2], device=rows.device)
    factor = torch.ones_like(distance, dtype=torch.float32)
    near = (distance >= 1) & (distance <= len(NEAR))
    factor[near] = NEAR.to(rows.device)[distance[near] - 1]
    factor[distance == 0] = 0
    factor[:, 0] = 0
    rows = rows.float() * factor
    return rows / (rows.sum(-1, keepdim=True) + 1e-12)


class LowEntropyRows:
    """Of each token the attention rows of lowest entropy over all layers and heads, in one row: "low_entropy_rows"
    (time - start, time), and "low_entropy_setting", the k, start and 1 for a mean.

    Rows are cleaned first, see `without_habits`. Nothing but the k best rows so far is kept of a token.

    Args:
        k: rows of a token that are put together; of equal entropies those of the lower layer, then of the lower head.
        reduction: how, element by element.
        start: the first token whose rows are kept.
    """

    def __init__(self, k: int = 16, reduction: Literal["max", "mean"] = "max", start: int = 0) -> None:
        if k < 1 or start < 0 or reduction not in ("max", "mean"):
            raise InputError(
                f"k={k}, reduction={reduction!r}, start={start} is not allowed; give k >= 1, max or mean, start >= 0"
            )
        self.k, self.reduction, self.start, self.heads = k, reduction, start, {}
        self.best: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, first_row: int, first_key: int, rows: Tensor) -> None:
        self.heads[layer] = rows.shape[0]
        skipped = max(0, self.start - first_row)
        if skipped >= rows.shape[1]:
            return
        seen = rows[:, :, : first_row + rows.shape[1] - first_key]  # the width is the same in all layers
        whole = torch.nn.functional.pad(seen, (first_key, 0))
        cleaned = without_habits(whole, first_row)[:, skipped:]
        entropy = -(cleaned * (cleaned + 1e-12).log()).sum(-1)
        first = first_row + skipped
        if first in self.best:
            entropy = torch.cat((self.best[first][0], entropy))
            cleaned = torch.cat((self.best[first][1], cleaned))
        entropy, order = entropy.sort(dim=0, stable=True)
        order = order[: self.k, :, None].expand(-1, -1, cleaned.shape[2])
        self.best[first] = entropy[: self.k], cleaned.gather(0, order)

    def result(self) -> dict[str, Tensor]:
        if self.k > sum(self.heads.values()):
            raise InputError(f"k={self.k} is not allowed; this model has {sum(self.heads.values())} layer-heads")
        total = max((first + rows.shape[1] for first, (_, rows) in self.best.items()), default=self.start)
        made = torch.zeros(total - self.start, total)
        for first, (_, rows) in self.best.items():
            one = rows.amax(0) if self.reduction == "max" else rows.mean(0)
            made[first - self.start :][: len(one), : one.shape[1]] = one.cpu()
        setting = torch.tensor([self.k, self.start, int(self.reduction == "mean")])
        return {"low_entropy_rows": made, "low_entropy_setting": setting}
