"""Keys and values that masked-diffusion sampling keeps from one step to the next (Fast-dLLM, arXiv 2505.22618).

Every committed token changes what all other tokens carry, so keeping anything is an approximation. It is renewed at the
start of each block. "prefix" keeps what is before the block and computes the rest; "dual" computes the block alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ..errors import InputError
from ..masks import as_attention_mask
from .diffusion_state import DiffusionState, Edit

__all__ = ["CACHES", "DiffusionCache"]

CACHES = ("none", "prefix", "dual")


class DiffusionCache:
    """Keys, values and logits of all columns, of which each forward computes the columns [first, last) anew.

    All rows must be in the same block. With models whose logits predict the next position (`shift`) the column before
    the block is computed too, since it predicts the first one of the block.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.kept: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer (batch, heads, columns, size)
        self.raw: Tensor | None = None  # logits (batch, time, vocabulary), unshifted
        self.valid = 0  # columns from the first one that are kept
        self.first = self.last = 0

    @classmethod
    def named(cls, name: str) -> DiffusionCache | None:
        """The cache of this name; None for "none"."""
        if name not in CACHES:
            raise InputError(f"cache={name!r} is unknown; use one of {', '.join(CACHES)}")
        return None if name == "none" else cls(name)

    def begin(self, state: DiffusionState, shift: bool) -> tuple[int, int]:
        """The columns [first, last) that the next forward computes."""
        width = state.x.shape[1]
        working = state.working
        fresh = bool((state.block_step[working] == 0).any())
        first = max(0, int(state.block_start[working].min()) - int(shift))
        last = int(state.block_end[working].max()) if self.kind == "dual" else width
        if fresh or first > self.valid or (last < width and self.valid < width):
            first, last = 0, width
        self.first, self.last = first, last
        return first, last

    def run(self, model: PreTrainedModel, x: Tensor, present: Tensor, positions: Tensor) -> Tensor:
        """Logits (batch, time, vocabulary), unshifted, those outside the computed columns from an earlier forward."""
        first, last = self.first, self.last
        cache = DynamicCache(config=model.config)
        for layer, (keys, values) in enumerate(self.kept if first else ()):
            cache.update(keys[:, :, :first], values[:, :, :first], layer)
        if last < x.shape[1]:
            # What is after the block goes before it: attention does not mind the order of keys, positions are inside.
            for layer, (keys, values) in enumerate(self.kept):
                cache.update(keys[:, :, last:], values[:, :, last:], layer)
        seen = torch.cat([present[:, :first], present[:, last:], present[:, first:last]], 1)
        mask = None if seen.all() else as_attention_mask(model, seen[:, None, None].expand(-1, 1, last - first, -1))
        out = model(
            input_ids=x[:, first:last],
            attention_mask=mask,
            position_ids=positions[:, first:last],
            past_key_values=cache,
            use_cache=True,
        )
        self._keep(cache, out.logits.float(), x.shape[1])
        return self.raw

    def _keep(self, cache: Cache, logits: Tensor, width: int) -> None:
        first, last = self.first, self.last
        after = width - last

        def in_order(t: Tensor) -> Tensor:
            return torch.cat([t[:, :, :first], t[:, :, first + after :], t[:, :, first : first + after]], 2)

        self.kept = [(in_order(layer.keys), in_order(layer.values)) for layer in cache.layers]
        whole = logits if self.raw is None or last - first == width else self.raw.clone()
        if whole is not logits:
            whole[:, first:last] = logits
        self.raw, self.valid = whole, width

    def reindex(self, edit: Edit) -> None:
        """What is kept stays good up to the first column that has moved; positions inside later keys are wrong."""
        self.valid = min(self.valid, edit.first_change)
        width = edit.source_index.shape[1]  # of a narrower window the rest must not be seen
        self.kept = [(keys[:, :, :width], values[:, :, :width]) for keys, values in self.kept]
        if self.raw is not None:
            self.raw = edit.take(self.raw, 0.0)
