"""Keys and values that masked-diffusion sampling keeps from one step to the next (Fast-dLLM, arXiv 2505.22618).

Every committed token changes what all other tokens carry, so keeping anything is an approximation. It is renewed at the
start of each block. "prefix" keeps what is before the block and computes the rest; "dual" computes the block alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel

from ...core.errors import InputError
from ...models.masks import as_attention_mask
from .state import DiffusionState, Edit

__all__ = ["CACHES", "DiffusionCache"]

CACHES = ("none", "prefix", "dual")


class DiffusionCache:
    """Keys, values and logits of all columns, of which each forward computes a row's columns [first, last) anew.

    All rows must be in the same block. Those that need a whole forward get one; the others do without, since what a
    neighbor needs must not change them. Rows that wait are not computed. With models whose logits predict the next
    position (`shift`) the column before the block is computed too, since it predicts the first one of the block.
    """

    raw: Tensor  # logits (batch, time, vocabulary), unshifted; with `kept` from the first forward on
    valid: Tensor  # (batch,) columns from the first one that are kept
    first: Tensor  # (batch,) what the next forward computes of each row
    last: Tensor

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.kept: list[list[Tensor]] = []  # keys and values of each layer (batch, heads, columns, size)
        self.groups: list[Tensor] = []  # rows (batch,) that are computed together

    @classmethod
    def named(cls, name: str) -> DiffusionCache | None:
        """The cache of this name; None for "none"."""
        if name not in CACHES:
            raise InputError(f"cache={name!r} is unknown; use one of {', '.join(CACHES)}")
        return None if name == "none" else cls(name)

    @property
    def calls(self) -> int:
        """How often the next forward calls the model."""
        return len(self.groups)

    def begin(self, state: DiffusionState, shift: bool) -> None:
        """Choose the columns [first, last) that the next forward computes of each row."""
        valid = self.valid if self.kept else torch.zeros_like(state.end)
        first = (state.block_start - int(shift)).clamp(min=0)
        last = state.block_end if self.kind == "dual" else state.end
        stale = (first > valid) | ((last < state.end) & (valid < state.end))
        whole = stale | (state.block_step == 0)
        self.valid = valid
        self.first, self.last = first.masked_fill(whole, 0), torch.where(whole, state.end, last)
        groups = (state.working & whole, state.working & ~whole)
        self.groups = [rows for rows in groups if bool(rows.any())]

    def run(self, model: PreTrainedModel, x: Tensor, present: Tensor, positions: Tensor) -> Tensor:
        """Logits (batch, time, vocabulary), unshifted, those outside the computed columns from an earlier forward."""
        for rows in self.groups:
            first, last = int(self.first[rows].min()), int(self.last[rows].max())
            cache = self._around(rows, first, last, model)
            seen = present[rows]
            seen = torch.cat([seen[:, :first], seen[:, last:], seen[:, first:last]], 1)
            mask = None if seen.all() else as_attention_mask(model, seen[:, None, None].expand(-1, 1, last - first, -1))
            out = model(
                input_ids=x[rows, first:last],
                attention_mask=mask,
                position_ids=positions[rows, first:last],
                past_key_values=cache,
                use_cache=True,
            )
            self._keep(rows, first, last, cache, out.logits.float(), x.shape)
        return self.raw

    def _around(self, rows: Tensor, first: int, last: int, model: PreTrainedModel) -> DynamicCache:
        """What these rows keep outside [first, last).

        What is after the block goes before it: attention does not mind the order of keys, positions are inside.
        """
        cache = DynamicCache(config=model.config)
        for layer, kept in enumerate(self.kept):
            outside = [torch.cat([t[rows, :, :first], t[rows, :, last:]], 2) for t in kept]
            if outside[0].shape[2]:
                cache.update(outside[0], outside[1], layer)
        return cache

    def _keep(self, rows: Tensor, first: int, last: int, cache: Cache, logits: Tensor, shape: torch.Size) -> None:
        """What a forward has computed of these rows; it stands last in its cache."""
        layers: list[Any] = cache.layers  # each with its keys and values
        if not self.kept:
            self.raw = logits.new_zeros(*shape, logits.shape[-1])
            pairs = [(layer.keys, layer.values) for layer in layers]
            self.kept = [[t.new_zeros(shape[0], t.shape[1], shape[1], t.shape[3]) for t in pair] for pair in pairs]
        self.raw[rows, first:last] = logits
        for kept, layer in zip(self.kept, layers):
            for whole, new in zip(kept, (layer.keys, layer.values)):
                whole[rows, :, first:last] = new[:, :, first - last :]
        self.valid[rows] = shape[1]

    def reindex(self, edit: Edit) -> None:
        """What a row keeps stays good up to its first column that has moved; positions in later keys are wrong."""
        self.valid = torch.minimum(self.valid, edit.first_change)
        more = edit.source_index.shape[1] - self.raw.shape[1]
        self.kept = [[F.pad(t, (0, 0, 0, more)) for t in pair] for pair in self.kept]
        self.raw = edit.take(self.raw, 0.0)
