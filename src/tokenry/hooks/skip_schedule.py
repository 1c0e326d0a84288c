"""How many layers each position gets, and a forward that skips the others in a whole text at once.

Shared by decoding with a schedule (`decode.skipdecode`) and by training for it (`train.skipdecode`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..core.errors import InputError
from ..core.fields import Tokens, check
from .layers import mask_layers

__all__ = ["Kind", "SkipSchedule", "skip_forward"]

Kind = Literal["linear", "constant", "power", "custom"]


@dataclass(frozen=True)
class SkipSchedule:
    """The depth of every position: it never grows, and what is skipped lies between the first and the top layers.

    Depth counts executed layers. The prompt has depth `e_max`. Behind it depth falls to `e_min` at the last planned
    token and stays there.

    Args:
        num_layers: layers of the model, L.
        e_max, e_min: largest and smallest depth, warmup + 1 <= e_min <= e_max <= L; default L and half of it.
        warmup: first layers that always run.
        prompt_len: columns of the prompt, padding included.
        planned_new_tokens: tokens after which `e_min` is reached.
        kind: how depth falls: "linear", "constant" (`e_min` at once), "power" (the share of the way to the power of
            `power`) or "custom" (`depths`).
        depths: of each new token, for "custom"; the last one stays. They take the place of `e_min`.

    Raises:
        InputError: a number out of range, or custom depths that grow.
    """

    num_layers: int
    e_max: int | None = None
    e_min: int | None = None
    warmup: int = 2
    prompt_len: int = 1
    planned_new_tokens: int = 256
    kind: Kind = "linear"
    power: float = 2.0
    depths: Sequence[int] = ()

    def __post_init__(self) -> None:
        layers, least = self.num_layers, self.warmup + 1
        if not 1 <= self.warmup < layers:
            raise InputError(
                f"warmup={self.warmup} is not allowed for {layers} layers; give 1 to {layers - 1} (layer 0 must run: "
                "the length of the cache is read from it)"
            )
        e_max = self._default("e_max", layers)
        if self.kind == "custom":
            self._check_depths(least, e_max)
            object.__setattr__(self, "e_min", self.depths[-1])
        e_min = self._default("e_min", min(e_max, max(least, math.ceil(layers / 2))))
        if not least <= e_max <= layers:
            raise InputError(f"e_max={e_max} is not allowed; give {least} (warmup + 1) to {layers} layers")
        if not least <= e_min <= e_max:
            raise InputError(f"e_min={e_min} is not allowed; give {least} (warmup + 1) to e_max={e_max}")
        if self.kind not in Kind.__args__:
            raise InputError(f"schedule {self.kind!r} is unknown; use one of {', '.join(Kind.__args__)}")
        if self.planned_new_tokens > 0:
            check("planned_new_tokens", self.planned_new_tokens, Tokens)
        for name in ("prompt_len", "planned_new_tokens", "power"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name}={getattr(self, name)} is not allowed; give a number > 0")

    def _default(self, name: str, value: int) -> int:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)
        return getattr(self, name)

    def _check_depths(self, least: int, e_max: int) -> None:
        if not self.depths:
            raise InputError("a custom schedule has no depths; give the depth of each new token")
        before = e_max
        for position, depth in enumerate(self.depths):
            if not least <= depth <= e_max:
                raise InputError(f"depth {depth} at new token {position} is not allowed; give {least} to {e_max}")
            if depth > before:
                raise InputError(f"depth grows from {before} to {depth} at new token {position}; it may only fall")
            before = depth

    @classmethod
    def for_speedup(cls, target: float, num_layers: int, e_max: int | None = None, **settings: Any) -> SkipSchedule:
        """The deepest schedule with `speedup() >= target`: `e_min` is lowered first, and `e_max` where that is not
        enough.

        Raises:
            InputError: not even warmup + 1 layers everywhere are fast enough.
        """
        if not 1 <= target < math.inf:
            raise InputError(f"target_speedup={target} is not allowed; give a number >= 1")
        most = cls(num_layers, e_max, **settings)
        least, (_, deepest) = most.warmup + 1, most.bounds
        tries = [(deepest, low) for low in range(deepest, least - 1, -1)]
        tries += [(high, least) for high in range(deepest - 1, least - 1, -1)]
        for high, low in tries:
            found = replace(most, e_max=high, e_min=low)
            if found.speedup() >= target:
                return found
        raise InputError(
            f"target_speedup={target} cannot be reached with {num_layers} layers and warmup={most.warmup}; give a "
            f"number up to {num_layers / least:.2f}"
        )

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """`e_min` and `e_max`, which are numbers once the schedule is made."""
        assert self.e_min is not None and self.e_max is not None
        return self.e_min, self.e_max

    @property
    def end(self) -> int:
        """The first column beyond the plan, T."""
        return self.prompt_len + self.planned_new_tokens

    @cached_property
    def needs(self) -> tuple[int, ...]:
        """The depth from which on each layer runs. A schedule that skips other layers changes this alone."""
        w, layers = self.warmup, self.num_layers
        return tuple(1 if layer < w else w + layers - layer for layer in range(layers))

    @cached_property
    def _table(self) -> tuple[int, ...]:
        """The depth of each planned new token."""
        if self.kind == "custom":
            return tuple(self.depths)
        last = max(1, self.planned_new_tokens - 1)
        return tuple(self._depth(i, last) for i in range(self.planned_new_tokens))

    def _depth(self, i: int, last: int) -> int:
        """Of new token `i` of 0 to `last`, rounded half up."""
        low, high = self.bounds
        if self.kind == "constant":
            return low
        if self.kind == "linear":  # in whole numbers, so that halves are halves
            return (2 * ((last - i) * high + i * low) + last) // (2 * last)
        return math.floor(high - (i / last) ** self.power * (high - low) + 0.5)

    @cached_property
    def _sets(self) -> dict[int, frozenset[int]]:
        low, high = self.bounds
        return {d: frozenset(i for i, need in enumerate(self.needs) if d >= need) for d in range(low, high + 1)}

    def depth(self, t: int) -> int:
        """How many layers column `t` runs, E(t)."""
        if t < self.prompt_len:
            return self.bounds[1]
        return self._table[min(t - self.prompt_len, len(self._table) - 1)]

    def layers(self, t: int) -> frozenset[int]:
        """The layers that column `t` runs, S(t)."""
        return self._sets[self.depth(t)]

    def mask(self, columns: int) -> Tensor:
        """Boolean (layers, columns): which column runs which layer."""
        return self.executed(torch.arange(columns) - self.prompt_len)

    def executed(self, new: Tensor) -> Tensor:
        """Boolean (layers, *shape of `new`): which layers run, for new tokens of these numbers (negative: prompt)."""
        table = torch.tensor(self._table, device=new.device)
        depths = table[new.clamp(0, len(self._table) - 1)].where(new >= 0, self.bounds[1])
        needs = torch.tensor(self.needs, device=new.device)
        return depths[None] >= needs.view(-1, *[1] * new.dim())

    def speedup(self) -> float:
        """Layers of the model / mean depth of the planned new tokens; embeddings, head and prompt are not counted."""
        depths = [self.depth(t) for t in range(self.prompt_len, self.end)]
        return self.num_layers * len(depths) / sum(depths)


def skip_forward(model: PreTrainedModel, input_ids: Tensor, mask: Tensor, **inputs: Any) -> ModelOutput:
    """A whole text in one forward, with every column as deep as `mask` says: what cached decoding computes, but for
    training and scoring. It saves the time of layers that no column runs, and no other.

    Args:
        input_ids: (batch, columns).
        mask: boolean (layers, columns) or (layers, batch, columns), for example `SkipSchedule.mask(columns)`.
        inputs: anything the model takes; `attention_mask` for padding on the left.

    Raises:
        InputError: a mask of another shape, without layer 0, or in which a layer begins again; a cached decoder would
            not have what lies between.
    """
    if mask.dtype == torch.bool and mask.dim() >= 2:
        if not bool(mask[0].all()):
            raise InputError("the mask leaves out layer 0, which always runs; set its first row to True")
        again = (mask[..., 1:] & ~mask[..., :-1]).nonzero()
        if len(again):
            layer, column = int(again[0, 0]), int(again[0, -1]) + 1
            raise InputError(f"layer {layer} runs again at column {column} after a pause; a layer may only end")
    with mask_layers(model, mask):
        return model(input_ids=input_ids, use_cache=False, **inputs)
