"""The key-value cache: everything tokenry knows about transformers' cache classes, in one place.

Checked on transformers 5.23: `crop` takes a negative count of tokens to remove and refuses sliding-window layers
past their window; masks for a forward are sized from one layer's length; sliding layers keep the last
`window - 1` columns unless `activate_past_recording` was called, and then keep all that come after.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

__all__ = ["cache_bytes", "gather_columns", "keep_of_last", "layer_lengths", "remove_last", "rewind_obstacle"]


def rewind_obstacle(cache: Cache | None) -> str | None:
    """Why tokens cannot be taken back from `cache` one by one, or None if they can."""
    if cache is None:
        return "the model runs without a cache"
    if not cache.layers and getattr(cache, "layer_class_to_replicate", None) is not DynamicLayer:
        return f"a {type(cache).__name__} cannot be shortened"
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None and hasattr(layer, "_quantized_keys"):
            return "a quantised cache cannot be shortened"
        if not isinstance(layer, DynamicLayer):
            return f"its {type(layer).__name__} keeps a state that cannot be taken back"
    return None


def is_sliding(cache: Cache) -> bool:
    """Whether any layer keeps only a window."""
    return any(getattr(layer, "is_sliding", False) for layer in cache.layers)


def layer_lengths(cache: Cache) -> list[int]:
    """Columns held by each layer (0 for a layer not used yet)."""
    return [0 if layer.keys is None else layer.keys.shape[-2] for layer in cache.layers]


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors)


def remove_last(cache: Cache, counts: Sequence[int]) -> None:
    """Drop the last `counts[i]` columns of layer i.

    `Cache.crop` gives one count to every layer, which is wrong when layers were skipped, and shrinks sliding
    layers to their window, so that a second rewind would find too little.
    """
    for layer, count in zip(cache.layers, counts, strict=True):
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
    for layer in cache.layers:
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
    for layer in cache.layers:
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
