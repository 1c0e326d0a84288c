"""One attention function registered with transformers, for everything that looks at or changes attention.

sdpa computes the output, always. Consumers see (query, key) after rotary embedding and q/k norm and rebuild
only the rows they want, in float32; no time x time map exists unless a consumer asks for every row. Editors
change the mask that sdpa gets. Both nest, may end in any order, and are gone when their context ends, also after an
error.

    with observe(model, recorder):          # recorder(call) for every attention layer of every forward
        model(input_ids)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..core.errors import InputError
from ..models.anatomy import attention_modules, decoder_body, layer_number
from ..models.masks import OBSERVED as NAME
from .holding import hold, owned
from .residual import Feed, on_feed

__all__ = ["AttentionCall", "edit_mask", "observe", "suppress"]


@dataclass
class AttentionCall:
    """One attention layer of one forward, as its observers see it.

    `query` is (batch, heads, q, head_dim), `key` and `value` (batch, kv_heads, k, head_dim), both positioned.
    `mask` is None (causal) or broadcasts to (batch, heads, q, k): True or 0 where attention is allowed.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    module: nn.Module

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    def rows(self, rows: slice | Tensor | None = None, heads: Tensor | None = None) -> Tensor:
        """Attention probabilities of chosen query rows and heads, (batch, heads, rows, k), float32.

        Query head h reads key head h // (heads / kv_heads).
        """
        q_length, k_length = self.query.shape[2], self.key.shape[2]
        heads = torch.arange(self.heads) if heads is None else torch.as_tensor(heads)
        picked = rows if isinstance(rows, Tensor) else torch.arange(q_length)[slice(None) if rows is None else rows]
        group = self.heads // self.key.shape[1]
        q = self.query[:, heads][:, :, picked].float()
        k = self.key[:, heads // group].float()
        scores = torch.matmul(q, k.transpose(-1, -2)) * self.scaling
        mask = self._mask_rows(picked, heads, q_length, k_length)
        if mask is not None:
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
            else:
                scores = scores + mask.float()
        return scores.softmax(-1)

    def _mask_rows(self, picked: Tensor, heads: Tensor, q_length: int, k_length: int) -> Tensor | None:
        if self.mask is not None:
            rows = self.mask[:, :, picked] if self.mask.shape[2] > 1 else self.mask
            return rows[:, heads] if rows.shape[1] > 1 else rows
        if q_length == 1:
            return None  # a decode step without a mask sees every key
        last_key = picked.to(self.key.device) + (k_length - q_length)
        return torch.arange(k_length, device=self.key.device) <= last_key[:, None]


Observer = Callable[[AttentionCall], None]
Editor = Callable[[AttentionCall], Tensor | None]

_ACTIVE = "_tokenry_attention"  # attribute on the attention modules: [(observer or editor, is_editor), ...]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = AttentionCall(layer_number(module), query, key, value, attention_mask, scale, module)
    consumers = getattr(module, _ACTIVE, ())
    for editor in (c for c, is_editor in consumers if is_editor):
        call.mask = editor(call)
    for observer in (c for c, is_editor in consumers if not is_editor):  # after all editors: they see what runs
        observer(call)
    return sdpa_attention_forward(module, query, key, value, call.mask, scaling=scaling, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def _installed(model: PreTrainedModel, consumer: Observer | Editor, is_editor: bool) -> Iterator[None]:
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        raise InputError(f"{type(model).__name__} caps its attention scores, which sdpa cannot do; use another model")
    modules = attention_modules(model)
    record = (owned(consumer), is_editor)
    with hold(model) as held, held.shared("attention", lambda: _routed(model)):
        try:
            for module in modules:
                setattr(module, _ACTIVE, (*getattr(module, _ACTIVE, ()), record))
            yield
        finally:
            for module in modules:
                left = tuple(r for r in getattr(module, _ACTIVE, ()) if r is not record)
                if left:
                    setattr(module, _ACTIVE, left)
                elif hasattr(module, _ACTIVE):
                    delattr(module, _ACTIVE)


@contextmanager
def _routed(model: PreTrainedModel) -> Iterator[None]:
    """Attention goes through `_attention`, for as long as anybody listens."""
    body = decoder_body(model)  # of a model with a vision tower, the half that is observed
    before = body.config._attn_implementation
    if before not in ("sdpa", NAME):
        raise InputError(
            f"attention implementation {before!r} cannot be observed; load the model with attn_implementation='sdpa'"
        )
    body.set_attn_implementation(NAME)
    try:
        yield
    finally:
        body.set_attn_implementation(before)


def observe(model: PreTrainedModel, observer: Observer):
    """Context manager: call `observer(call)` for every attention layer of every forward. Outputs do not change."""
    return _installed(model, observer, is_editor=False)


def edit_mask(model: PreTrainedModel, editor: Editor):
    """Context manager: let `editor(call)` return the mask that attention uses (None = plain causal)."""
    return _installed(model, editor, is_editor=True)


def is_edited(module: nn.Module) -> bool:
    """Whether an editor changes the mask of this attention module now."""
    return any(is_editor for _, is_editor in getattr(module, _ACTIVE, ()))


def allowed(call: AttentionCall) -> Tensor:
    """The mask of `call` as a boolean tensor (batch or 1, heads or 1, q, k) that an editor may change."""
    q_length, k_length = call.query.shape[2], call.key.shape[2]
    if call.mask is None:
        keys = torch.arange(k_length, device=call.key.device)
        queries = torch.arange(q_length, device=call.key.device) + (k_length - q_length)
        return (keys <= queries[:, None])[None, None]
    return call.mask if call.mask.dtype == torch.bool else call.mask >= 0


@contextmanager
def suppress(
    model: PreTrainedModel,
    spans: list[tuple[int, int]],
    layers: set[int] | None = None,
    heads: Tensor | None = None,
    each: bool = False,
) -> Iterator[None]:
    """Later tokens cannot attend to the columns in `spans` (half-open), in chosen layers and heads.

    All rows of a batch lose all spans, with `each` row i loses span i alone. Columns count from the start of the
    sequence, padding included. A token always still sees itself, so that no row is empty.

    Raises:
        InputError: with `each`, another number of spans than of rows.
    """
    feeds: list[Feed] = []

    def begin(feed: Feed) -> None:
        feeds[:] = [feed]

    def editor(call: AttentionCall) -> Tensor | None:
        if layers is not None and call.layer not in layers:
            return call.mask
        seen, batch = allowed(call), len(call.query)
        if each and batch != len(spans):
            raise InputError(f"there are {len(spans)} spans for a batch of {batch}; give one for each row")
        mask = seen.expand(len(spans) if each else -1, -1 if heads is None else call.heads, -1, -1).clone()
        q_length, k_length = call.query.shape[2], call.key.shape[2]
        if feeds[0].stop != k_length and getattr(call.module, "_tokenry_cutter", None) is not None:
            raise InputError(
                f"layer {call.layer} has lost columns to cache compression, so spans cannot be found in it; leave "
                "compression out"
            )
        dropped = feeds[0].stop - k_length  # a sliding layer's cache no longer holds the first columns
        picked = slice(None) if heads is None else heads
        for row, (start, stop) in enumerate(spans):
            mask[row if each else slice(None), picked, :, max(start - dropped, 0) : max(stop - dropped, 0)] = False
        own = torch.arange(q_length, device=mask.device)
        mask[:, :, own, own + (k_length - q_length)] = True
        return mask

    with on_feed(model, begin), edit_mask(model, editor):
        yield
