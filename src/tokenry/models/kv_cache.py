"""The key-value cache: everything tokenry knows about transformers' cache classes, in one place.

Checked on transformers 5.23: `crop` takes a negative count of tokens to remove and refuses sliding-window layers
past their window; masks for a forward are sized from one layer's length; sliding layers keep the last
`window - 1` columns unless `activate_past_recording` was called, and then keep all that come after. Recurrent layers,
convolutions and indexers keep something beside keys and values, or instead of them; a cache of recurrent layers alone
does not say how many tokens it has seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from ..core.errors import InputError

__all__ = [
    "ShortLayer",
    "beginning_of",
    "cache_bytes",
    "forward_arguments",
    "gather_columns",
    "held_columns",
    "join_rows",
    "keep_of_last",
    "key_layers",
    "later_inputs",
    "layer_lengths",
    "narrowest_window",
    "new_cache",
    "remove_last",
    "rewind_obstacle",
    "row_of",
    "shallow_copy",
    "state_argument",
    "without_adapters",
]


def forward_arguments(model: PreTrainedModel) -> Collection[str]:
    """The names that the model's forward takes; an adapter of peft hands on whatever it is given."""
    return inspect.signature(without_adapters(model).forward).parameters


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The model inside what peft puts around it, or the model."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def state_argument(model: PreTrainedModel) -> str | None:
    """The argument of the model's forward that carries the text so far; None if the model keeps nothing.

    Raises:
        InputError: it is one that cannot be carried from one forward to the next here.
    """
    accepted = forward_arguments(model)
    for name in ("mems", "past_buckets_states"):
        if name in accepted:
            raise InputError(
                f"{type(model).__name__} keeps its state in {name}, which is no cache; use a model that takes "
                "past_key_values"
            )
    return next((name for name in ("past_key_values", "cache_params", "state") if name in accepted), None)


def later_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """What `generate` feeds behind the first token of a text of two; both where the model keeps nothing.

    Raises:
        InputError: other tokens than these.
    """
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    new = 1 if state_argument(model) else 2
    given = {"attention_mask": torch.ones_like(ids), "use_cache": True} | (
        {"next_sequence_length": 1} if new == 1 else {}
    )
    fed = cast(Any, model).prepare_inputs_for_generation(ids, is_first_iteration=False, **given)
    if fed.get("input_ids") is None or fed["input_ids"].shape[1] != new:
        raise InputError(
            f"{type(model).__name__} is not continued with its next token alone, but with others beside it; use a "
            "model that is"
        )
    return fed


def new_cache(model: PreTrainedModel) -> Cache | None:
    """An empty cache; None where the model makes its own in the first forward."""
    if state_argument(model) in (None, "state") or not cast(Any, model)._supports_default_dynamic_cache():
        return None
    return DynamicCache(config=model.config)


def held_columns(cache: Any) -> int:
    """How many columns a cache holds, 0 also for none.

    Raises:
        InputError: the cache was used and does not know.
    """
    layers = getattr(cache, "layers", [])
    if not layers:
        return 0
    if any(isinstance(layer, CacheLayerMixin) for layer in layers):
        return int(cache.get_seq_length())
    if any(any(layer.has_previous_state.values()) for layer in layers if hasattr(layer, "has_previous_state")):
        raise InputError("a cache of recurrent layers does not say how many tokens it has seen; pass an empty one")
    return 0


def rewind_obstacle(cache: Cache | None) -> str | None:
    """Why tokens cannot be taken back from `cache` one by one, or None if they can."""
    if cache is None:
        return "the model runs without a cache"
    if not cache.layers and getattr(cache, "layer_class_to_replicate", None) is not DynamicLayer:
        return f"a {type(cache).__name__} cannot be shortened"
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None and hasattr(layer, "_quantized_keys"):
            return "a quantized cache cannot be shortened"
        # not what is derived from them: that keeps more
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, ShortLayer, DummyLayer):
            return f"its {type(layer).__name__} keeps a state that cannot be taken back"
    return None


def key_layers(cache: Cache) -> list[Any]:
    """The layers of a cache, for their `keys` and `values` (None before a layer is used) and, with a window, their
    `cumulative_length`. To type checkers a layer is of any kind, also of those that have none of these."""
    return cache.layers


def is_sliding(cache: object) -> bool:
    """Whether any layer keeps only a window."""
    return any(getattr(layer, "is_sliding", False) for layer in getattr(cache, "layers", []))


def narrowest_window(cache: Cache) -> int | None:
    """The fewest columns that a layer sees, itself included; None where all see everything."""
    return min((one.sliding_window for one in key_layers(cache) if getattr(one, "is_sliding", False)), default=None)


def layer_lengths(cache: object) -> list[int]:
    """Columns held by each layer (0 for a layer not used yet, or without keys)."""
    keys = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", [])]
    return [0 if states is None or not states.numel() else states.shape[-2] for states in keys]


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values."""
    states = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in states if t is not None)


def remove_last(cache: Cache, counts: Sequence[int]) -> None:
    """Drop the last `counts[i]` columns of layer i.

    `Cache.crop` gives one count to every layer, which is wrong when layers were skipped, and shrinks sliding
    layers to their window, so that a second rewind would find too little.
    """
    for layer, count in zip(key_layers(cache), counts, strict=True):
        if count == 0 or layer.keys is None:
            continue
        layer.keys, layer.values = layer.keys[:, :, :-count], layer.values[:, :, :-count]
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length -= count


def gather_columns(cache: Cache, columns: Tensor) -> None:
    """Keep only `columns` (batch, kept) of every layer, in that order, each row its own.

    Column numbers count from the start of the sequence; a sliding layer that has already dropped its oldest
    columns keeps what it still has (the rest lies outside every later window).
    """
    kept = columns.shape[1]
    for layer in key_layers(cache):
        if layer.keys is None:
            continue
        held = layer.keys.shape[-2]
        dropped = getattr(layer, "cumulative_length", held) - held
        wanted = (columns[:, max(kept - held, 0) :] - dropped).clamp(min=0)
        index = wanted[:, None, :, None].to(layer.keys.device)
        batch, heads, _, width = layer.keys.shape
        layer.keys = layer.keys.gather(2, index.expand(batch, heads, -1, width))
        layer.values = layer.values.gather(2, index.expand(batch, heads, -1, layer.values.shape[-1]))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = kept


def keep_of_last(cache: Cache, index: Tensor, count: int) -> None:
    """Of the last `count` columns of every layer keep `index` (batch, kept <= count), each row its own, in that order.

    Written in place at the front of these columns, so that what lies before them is not copied.
    """
    kept = index.shape[1]
    for layer in key_layers(cache):
        if layer.keys is None:
            continue
        start = layer.keys.shape[-2] - count
        for name in ("keys", "values"):
            states = getattr(layer, name)
            last = states[:, :, start:]
            where = index[:, None, :, None].to(states.device).expand(-1, states.shape[1], -1, states.shape[-1])
            last[:, :, :kept] = last.gather(2, where)
            setattr(layer, name, states[:, :, : start + kept])
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length -= count - kept


def shallow_copy(cache: Cache) -> Cache:
    """A cache with the same keys and values, which goes on in its own way: layers put new ones together, and leave the
    old ones as they are."""
    one = copy(cache)
    one.layers = [copy(layer) for layer in cache.layers]
    return one


def row_of(cache: Cache, row: int) -> Cache:
    """A cache with a copy of one row."""
    one = shallow_copy(cache)
    one.batch_select_indices(torch.tensor([row]))
    return one


def beginning_of(cache: Cache, dropped: int, rows: int) -> Cache:
    """What a cache of one row held before its last `dropped` columns, for so many rows. Nothing is copied, as in
    `shallow_copy`."""
    one = shallow_copy(cache)
    remove_last(one, [dropped] * len(one.layers))
    for layer in key_layers(one):
        if layer.keys is not None:
            layer.keys = layer.keys.expand(rows, -1, -1, -1)
            layer.values = layer.values.expand(rows, -1, -1, -1)
    return one


def join_rows(cache: Cache, other: Cache) -> None:
    """Put the rows of another cache under those of `cache`, the shorter ones behind empty columns, so that all end in
    the same column."""
    for layers in zip(key_layers(cache), key_layers(other), strict=True):
        layer, held = layers[0], [0 if one.keys is None else one.keys.shape[-2] for one in layers]
        if not all(held):
            continue
        for name in ("keys", "values"):
            parts = [pad(getattr(one, name), (0, 0, max(held) - count, 0)) for one, count in zip(layers, held)]
            setattr(layer, name, torch.cat(parts))
        if hasattr(layer, "cumulative_length"):
            layer.cumulative_length = max(one.cumulative_length for one in layers)


class ShortLayer(DynamicLayer):
    """A layer from which columns of the prompt were evicted.

    Its length is how many columns were seen, since positions count from there; masks get the columns that are left. Who
    hides what is gone opens the layer for the time of a forward; otherwise the model would count from the short cache.

    Attributes:
        columns: (batch, kept) int64, what is left of the prompt.
        length: columns of the prompt, left padding included; 0 after a reset.
        valid: (batch, length) bool, False on padding; None without padding.
        open: whether a forward may use the layer.
    """

    def __init__(self, layer: DynamicLayer, columns: Tensor, length: int, valid: Tensor | None) -> None:
        super().__init__()
        vars(self).update(vars(layer))
        self.columns, self.length, self.valid, self.open = columns, length, valid, False

    def get_seq_length(self) -> int:
        held = super().get_seq_length()
        return held and held + self.length - self.columns.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        self._check_open()
        return super().get_seq_length() + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object):
        self._check_open()
        return super().update(key_states, value_states, *args, **kwargs)

    def reset(self) -> None:
        super().reset()
        self.columns, self.length, self.valid = self.columns[:, :0], 0, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._take(torch.arange(len(self.columns)).repeat_interleave(repeats))

    def _take(self, rows: Tensor) -> None:
        rows = rows.to(self.columns.device)
        self.columns, self.valid = self.columns[rows], None if self.valid is None else self.valid[rows]

    def _check_open(self) -> None:
        if self.length and not self.open:
            raise InputError(
                f"a cache that has lost columns of its {self.length} prompt tokens only works where it is compressed; "
                "continue inside that context, or start with an empty cache"
            )
