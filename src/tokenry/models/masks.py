"""Who may look at whom: bidirectional models, structured attention masks, and a test that a mask is obeyed.

A mask is boolean, (batch or 1, 1, queries, keys), True where a query may see a key; `as_attention_mask` makes of it
what the model's attention takes (eager attention would add a boolean mask to its scores). Some models drop such a mask
without a word, so a method that relies on one calls `check_mask` first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from ..core.errors import InputError
from .anatomy import decoder_body, outermost, vocabulary_size
from .kv_cache import is_sliding, rewind_obstacle

__all__ = [
    "as_attention_mask",
    "block_diffusion_mask",
    "check_bidirectional",
    "check_full_attention",
    "check_mask",
    "check_mask_token",
    "draft_mask",
    "make_bidirectional",
    "own_position",
    "sees_both_sides",
    "tree_mask",
]


OBSERVED = "tokenry"  # what `attention.observe` calls its own implementation, which computes with sdpa
KERNELS = ("sdpa", "eager", OBSERVED)  # attention implementations that take any boolean mask


# --- bidirectional models ------------------------------------------------------------------------------------------


def make_bidirectional(model: PreTrainedModel) -> PreTrainedModel:
    """Let every token see both sides from now on; returns the same model. Saved checkpoints stay bidirectional."""
    model.config.get_text_config().is_causal = False
    return model


def own_position(logits: Tensor, shift: bool) -> Tensor:
    """Logits (batch, time, vocabulary) as predictions of each position's own token.

    With `shift` position i is predicted by the row before it, as in Dream; position 0 then keeps its own row.
    """
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1) if shift else logits


def check_mask_token(model: PreTrainedModel, mask_token_id: int) -> None:
    """Refuse a mask token that has no embedding."""
    size = vocabulary_size(model)
    if not 0 <= mask_token_id < size:
        raise InputError(f"mask_token_id={mask_token_id} is outside the vocabulary of {size}; choose an unused token")


def sees_both_sides(model: PreTrainedModel) -> bool:
    """Whether tokens see later ones, as the configuration and the attention modules say: BERT, or a denoiser."""
    config = model.config.get_text_config(decoder=True)
    if not (getattr(config, "is_causal", True) and getattr(config, "causal", True)):  # the latter is XLM's
        return True
    names = ("is_causal", "is_decoder")  # cross-attention is not causal in a decoder either: one that is, suffices
    parts = outermost(decoder_body(model), lambda part: any(name in vars(part) for name in names))
    said = [vars(part)[name] for part in parts for name in names if name in vars(part)]
    return bool(said) and not any(said)


@torch.no_grad()
def check_bidirectional(model: Any) -> None:
    """Refuse a model whose first position does not depend on the last one.

    Raises:
        InputError: the model is causal.
    """
    ids = _probe(model, 6)
    if not _changed(model, ids, None, _logits(model, ids, None), source=5)[0]:
        raise InputError(
            "logits of position 0 do not depend on later tokens: the model is causal; give a bidirectional one, or "
            "train it with make_bidirectional(model)"
        )


# --- masks ---------------------------------------------------------------------------------------------------------


def block_diffusion_mask(length: int, block_size: int) -> Tensor:
    """For [clean text | one mask for each of its tokens]: (1, 1, 2 * length, 2 * length).

    A clean row sees the clean rows up to itself. A mask row of block b sees the clean rows of the blocks before b, and
    the mask rows of b.
    """
    _check_block(block_size)
    i = torch.arange(length)
    block = i // block_size
    clean = i[:, None] >= i
    context = block[:, None] > block
    within = block[:, None] == block
    top = torch.cat([clean, torch.zeros_like(clean)], 1)
    return torch.cat([top, torch.cat([context, within], 1)], 0)[None, None]


def draft_mask(past: int, block_size: int) -> Tensor:
    """For [draft of B tokens | replicas 1..B of B masks] after `past` cached tokens: (1, 1, B + B B, past + B + B B).

    Draft row k sees the cache and the draft up to itself. The masks of replica r see the cache, the first r tokens of
    the draft, and each other.
    """
    _check_block(block_size)
    replica = torch.arange(block_size).repeat_interleave(block_size)
    k = torch.arange(block_size)
    top = torch.cat([k[:, None] >= k, torch.zeros(block_size, len(replica), dtype=torch.bool)], 1)
    rest = torch.cat([replica[:, None] >= k, replica[:, None] == replica], 1)
    mask = torch.cat([top, rest], 0)
    return torch.cat([torch.ones(len(mask), past, dtype=torch.bool), mask], 1)[None, None]


def as_attention_mask(model: PreTrainedModel, mask: Tensor) -> Tensor:
    """A boolean mask as the `attention_mask` of this model: as it is for sdpa, as numbers that are added for eager.

    Raises:
        InputError: another attention implementation.
    """
    name = model.config.get_text_config()._attn_implementation
    if name not in KERNELS:
        raise InputError(f"{name} does not take a structured mask; load the model with attn_implementation='sdpa'")
    mask = mask.to(model.device)
    if name != "eager":
        return mask
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(
        ~mask, torch.finfo(model.dtype).min
    )


def _check_block(block_size: int) -> None:
    if block_size < 2:
        raise InputError(f"block_size={block_size} is not allowed; give a number of tokens >= 2")


# --- is it obeyed? -------------------------------------------------------------------------------------------------


def check_full_attention(model: PreTrainedModel) -> None:
    """Refuse a model in which a layer loses what a mask lets it see, as soon as the text is long enough.

    Raises:
        InputError: a layer with a sliding window or a recurrent state.
    """
    cache = DynamicCache(config=model.config)
    why = "has layers with a sliding window" if is_sliding(cache) else rewind_obstacle(cache)
    if why:
        raise InputError(f"{type(model).__name__}: {why}; use a model with full attention in every layer")


@torch.no_grad()
def check_mask(model: PreTrainedModel, mask: Tensor) -> None:
    """Refuse a model that lets information through where the mask (1, 1, time, time) does not, or that loses it.

    One token is replaced at a time; the logits that change must be those that the mask, applied once for every layer,
    lets the token reach. Costs `time + 1` forwards.

    Raises:
        InputError: the attention implementation takes no such mask, or the mask is not obeyed.
    """
    time = mask.shape[-1]
    ids = _probe(model, time)
    sees = mask[0, 0].to(ids.device)
    reach = torch.eye(time, dtype=torch.bool, device=ids.device)
    for _ in range(model.config.get_text_config().num_hidden_layers):
        reach = reach | (sees.float() @ reach.float() > 0)
    before = _logits(model, ids, mask)
    changed = torch.stack([_changed(model, ids, mask, before, source) for source in range(time)], 1)
    leaks, lost = changed & ~reach, sees & ~changed
    if leaks.any():
        row, column = leaks.nonzero()[0].tolist()
        raise InputError(
            f"{type(model).__name__} ignores the attention mask: row {row} sees token {column}; use another model, or "
            "attn_implementation='sdpa'"
        )
    if lost.any():
        row, column = lost.nonzero()[0].tolist()
        raise InputError(
            f"{type(model).__name__} hides token {column} from row {row}, which the mask lets see it; a sliding window "
            "or recurrent layers cannot follow this mask"
        )


def _probe(model: Any, time: int) -> Tensor:
    size = vocabulary_size(model)
    return (torch.arange(time, device=model.device) * 7 % max(1, size - 1))[None]


def _logits(model: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    mask = None if mask is None else as_attention_mask(model, mask)
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]


def _changed(model: Any, ids: Tensor, mask: Tensor | None, before: Tensor, source: int) -> Tensor:
    """Which rows (time,) have other logits when the token at `source` is another one.

    Both calls have the same shape, so that rows that see nothing new are equal bit by bit.
    """
    other = ids.clone()
    other[0, source] = vocabulary_size(model) - 1
    return (_logits(model, other, mask) != before).any(-1)


# --- masks of draft trees --------------------------------------------------------------------------------------


def tree_mask(
    model: PreTrainedModel, cache: Cache, allowed: Tensor, queries: Tensor, keys: Tensor
) -> Tensor | dict[str, Tensor]:
    """The `attention_mask` of a forward in which tokens see other columns than all before them.

    Checked on transformers 5.23: a model takes a mask of four dimensions as it is, or one for each kind of layer.

    Args:
        allowed: (batch, new, columns), True where a new token may look, without regard to windows.
        queries, keys: positions (batch, new) and (batch, columns). A window counts positions, since siblings have the
            same one.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    unknown = kinds - {"full_attention", "sliding_attention"}
    if unknown:
        raise InputError(
            f"{type(model).__name__} has layers of {unknown.pop()!r}, for which there is no draft tree; use a model "
            "with full or sliding attention"
        )
    full = as_attention_mask(model, allowed[:, None])
    near = [layer for layer in cache.layers if getattr(layer, "is_sliding", False)]
    if not near:
        return full
    layer, new = near[0], allowed.shape[1]
    inside = allowed & (queries[:, :, None] - keys[:, None, :] < layer.sliding_window)
    held = 0 if layer.keys is None else layer.keys.shape[-2]
    visible = min(held, layer.sliding_window - 1) + new  # what such a layer gives to attention
    sliding = as_attention_mask(model, inside[:, None, :, -visible:])
    return {"full_attention": full, "sliding_attention": sliding} if kinds else sliding
