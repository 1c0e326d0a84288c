"""Score, keep, carry on: what every method that shortens a key-value cache is made of.

A method is a token scorer, a budget per layer and a `CacheCutter`. The cutter works right after prefill, layer by
layer: prefill itself runs on the full cache, only later tokens see the short one. Layers may keep different numbers
of tokens; `PerLayerMask` gives each its own mask, because transformers sizes one mask from one layer's cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ...core.errors import InputError
from ...hooks.attention import AttentionCall, observe
from ...hooks.holding import hold, hooked
from ...models.anatomy import attention_modules, decoder_body, full_attention_layers
from ...models.kv_cache import ShortLayer, held_columns, layer_lengths
from ..keep.keep_map import KeepMap, LayerView, TokenScorer
from ..keep.topk import keep_topk

__all__ = ["CacheCutter", "PerLayerMask"]

_CUTTER = "_tokenry_cutter"  # attribute on the attention modules that are cut: whose they are


# --- the cutter ------------------------------------------------------------------------------------------------


class PerLayerMask:
    """Builds the attention mask of a layer from what it kept.

    A layer's cache holds the kept columns of the prompt and then every column that came later, also after the
    decode loop cropped some. The model's 2-D mask speaks about all columns there ever were.
    """

    def __init__(self, keep: KeepMap, mask: Tensor | None) -> None:
        """`mask` is (batch, T + later columns) bool, or None when nothing is hidden."""
        self.keep, self.mask = keep, mask

    def build(self, layer: int, held: int, q_length: int) -> Tensor | None:
        """(batch or 1, 1, q, held + q) bool, True where attention is allowed; None when everything is.

        `held` counts the layer's columns before this forward.
        """
        device = self.keep.columns[layer].device
        visible = self._visible(layer, held + q_length)
        if q_length == 1:
            return None if visible is None else visible[:, None, None]
        key = torch.arange(held + q_length, device=device)
        query = torch.arange(held, held + q_length, device=device)
        causal = (key <= query[:, None])[None, None]
        return causal if visible is None else causal & visible[:, None, None]

    def _visible(self, layer: int, total: int) -> Tensor | None:
        """(batch, total) bool over the layer's own columns."""
        columns, valid, length = self.keep.columns[layer], self.keep.valid, self.keep.length
        if self.mask is not None:
            seen, later = self.mask[:, :length], self.mask[:, length:]
            if valid is not None:
                seen = seen & valid  # padding of the prompt stays hidden whatever a later mask says
        elif valid is not None:
            seen, later = valid, columns.new_ones(columns.shape[0], total - columns.shape[1], dtype=torch.bool)
        else:
            return None
        return torch.cat([seen.gather(1, columns), later], 1)


class CacheCutter:
    """Context manager: shorten each layer's cache right after prefill.

    A prefill is a forward whose cache is empty when it starts, so every new `generate` call is compressed anew.
    Position ids keep counting from the prompt's full length, also in a bare `model(ids, past_key_values=cache)`, and so
    does the cache: its length is what was seen. The short cache is for use inside such a context, this one or a later
    one: outside, where nothing hides what is missing, it is refused.

    Args:
        scorer: what each token is worth.
        budgets: columns to keep, per layer; layers that are not named are left alone.
        protect_last: newest prompt tokens that are always kept, counted in the budget.

    Attributes:
        trace: KeepMap of the last prefill, None before the first.
    """

    def __init__(
        self, model: PreTrainedModel, scorer: TokenScorer, budgets: Mapping[int, int], protect_last: int = 0
    ) -> None:
        if model.config.is_encoder_decoder:
            raise InputError(f"{type(model).__name__} has an encoder; cache compression takes decoder-only models")
        self.model, self.scorer, self.budgets, self.protect_last = model, scorer, dict(budgets), protect_last
        self.trace: KeepMap | None = None
        self._call: AttentionCall | None = None
        self._mask: PerLayerMask | None = None
        self._open: list[ShortLayer] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        decoder = decoder_body(self.model)
        implementation = decoder.config._attn_implementation
        if implementation not in ("eager", "sdpa", "tokenry"):
            raise InputError(
                f"attention implementation {implementation!r} takes no mask per layer; "
                "load the model with attn_implementation='sdpa'"
            )
        if getattr(self.model.config.get_text_config(), "is_causal", True) is False:
            raise InputError("a model that reads both ways computes its prompt again and again; compress a causal one")
        names = list(inspect.signature(decoder.forward).parameters)
        if "position_ids" not in names:
            raise InputError(
                f"{type(self.model).__name__} takes no position_ids, so its positions cannot keep counting"
            )
        modules = attention_modules(self.model)
        cut = [module for module in modules if module.layer_idx in self.budgets]
        unnamed = [module for module in cut if "past_key_values" not in inspect.signature(module.forward).parameters]
        if unnamed:
            raise InputError(
                f"{type(unnamed[0]).__name__} does not get its cache as past_key_values, so it cannot be cut; use "
                "another model"
            )
        with ExitStack() as stack:  # whatever was opened is closed again when a later step fails
            stack.enter_context(hold(self.model))
            if any(isinstance(getattr(m, _CUTTER, None), CacheCutter) for m in modules):
                raise InputError("the cache of this model is already being compressed; leave the other context first")
            if self.scorer.reads_attention and implementation != "eager":
                stack.enter_context(observe(self.model, self._remember))
            begin = hooked(
                decoder,
                lambda module, args, kwargs: self._before_model(dict(zip(names, args)) | kwargs),
                before=True,
                with_kwargs=True,
            )
            stack.enter_context(begin)
            stack.enter_context(hooked(decoder, self._after_model, always_call=True))
            masked = {*full_attention_layers(self.model), *self.budgets}  # the model sizes masks by layers that are cut
            for module in modules:
                if module.layer_idx in masked:
                    stack.enter_context(hooked(module, self._before_layer, before=True, with_kwargs=True))
                if module.layer_idx in self.budgets:
                    setattr(module, _CUTTER, self)
                    stack.callback(delattr, module, _CUTTER)
                    stack.enter_context(hooked(module, self._after_layer, with_kwargs=True))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._call = self._mask = None
        self._stack.close()

    def cut(self, cache: Cache, calls: Mapping[int, AttentionCall]) -> KeepMap:
        """Shorten a cache that a prefill without padding has filled outside this context.

        For several cutters that share one prefill: give each a copy of its cache, and the prefill's attention calls
        by layer (see `attention.observe`). The context must still be open for the tokens that follow.
        """
        keep = self.trace = KeepMap(next(iter(calls.values())).query.shape[2])
        for layer in self.budgets:
            store: Any = cache.layers[layer]  # a DynamicLayer that holds keys and values
            view = LayerView(layer, store.keys, store.values, None, _newest_rows(calls[layer]))
            cache.layers[layer] = self._cut(view, store, keep)
        return keep

    def _remember(self, call: AttentionCall) -> None:
        self._call = call

    # --- before a forward --------------------------------------------------------------------------------------

    def _before_model(self, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        q_length = tokens.shape[1]
        self._mask = None
        if cache is None or held_columns(cache) == 0:
            self.trace = KeepMap(q_length, self._check_prompt(cache, mask))
            return (), kwargs
        keep = _kept(cache)
        if keep is None:
            return (), kwargs
        # a layer policy may have skipped layers lately: the longest one has seen everything
        seen = max(cache.layers[i].get_seq_length() for i in keep.columns)
        if seen < keep.length:
            raise InputError(
                "the cache was cropped into the compressed prompt, as assisted generation does with its first draft; "
                "generate without an assistant or prompt lookup"
            )
        if mask is not None and (mask.dim() != 2 or mask.shape[1] != seen + q_length):
            raise InputError(
                f"attention_mask has shape {tuple(mask.shape)}, but {seen + q_length} tokens were seen; "
                "give a 2-D mask with one entry for every token, evicted ones included"
            )
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = torch.arange(seen, seen + q_length, device=tokens.device)[None]
        else:
            _check_positions(kwargs["position_ids"], keep, mask, seen)
        self._mask = PerLayerMask(keep, None if mask is None else mask.bool())
        self._open = [layer for layer in cache.layers if isinstance(layer, ShortLayer)]
        for layer in self._open:
            layer.open = True
        return (), kwargs

    def _after_model(self, *_: object) -> None:
        for layer in self._open:
            layer.open = False
        self._open = []

    def _check_prompt(self, cache: Cache | None, mask: Tensor | None) -> Tensor | None:
        """The prompt's padding as (batch, T) bool, or None. Refuses what cannot be cut."""
        for layer in [] if cache is None else [cache.layers[index] for index in self.budgets if index < len(cache)]:
            if hasattr(layer, "_quantized_keys") or getattr(layer, "is_compileable", False):
                raise InputError(f"a {type(cache).__name__} cannot be cut; use the default dynamic cache")
        if mask is None:
            return None
        if isinstance(mask, dict):
            raise InputError(
                f"{type(self.model).__name__} prepares its masks before it calls its language model, so none can be "
                "made for each layer; use a model of text alone"
            )
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise InputError(
                "cache compression reads a 2-D attention_mask (batch, tokens); do not pass a 4-D one, and leave it out "
                "where a method needs one, as tidar and draft trees do"
            )
        valid = mask.bool()
        if bool(valid.all()):
            return None
        if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
            raise InputError("the prompts are padded on the right; set tokenizer.padding_side = 'left'")
        return valid

    def _before_layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        layer = cast(int, module.layer_idx)
        if self._mask is None or layer not in self._mask.keep.columns:
            return None
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        held = layer_lengths(kwargs["past_key_values"])[layer]
        mask = self._mask.build(layer, held, hidden.shape[1])
        if mask is not None and decoder_body(self.model).config._attn_implementation == "eager":  # which adds its mask
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        return args, kwargs | {"attention_mask": mask}

    # --- after prefill -----------------------------------------------------------------------------------------

    def _after_layer(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple) -> None:
        call, self._call = self._call, None
        cache = kwargs.get("past_key_values")
        if cache is None or self._mask is not None or self.trace is None:
            return
        layer, keep = cast(int, module.layer_idx), self.trace
        store = cache.layers[layer]
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if store.get_seq_length() != hidden.shape[1]:
            return  # a later forward on a cache that was short enough to stay whole

        def of_eager(w: int, heads: Sequence[int]) -> Tensor:  # which gives every row
            return output[1][:, list(heads), -w:].float()

        attention = of_eager if call is None else _newest_rows(call)
        cache.layers[layer] = self._cut(LayerView(layer, store.keys, store.values, keep.valid, attention), store, keep)

    def _cut(self, view: LayerView, store: DynamicLayer, keep: KeepMap) -> DynamicLayer:
        """The layer as it goes on: shortened, or as it is where no layer is."""
        _, kv_heads, length, _ = view.keys.shape
        per_head = sum(t.shape[-1] * t.element_size() for t in (view.keys, view.values))
        keep.column_bytes[view.layer] = kv_heads * per_head
        budget = self.budgets[view.layer]
        if budget >= length:
            columns = keep.columns[view.layer] = _every_column(view.keys, length)
            return ShortLayer(store, columns, length, keep.valid) if min(self.budgets.values()) < length else store
        scores = self.scorer.score(view).float()
        if view.valid is not None:
            scores = scores.masked_fill(~view.valid, float("-inf"))
        newest = torch.arange(length, device=scores.device) >= length - self.protect_last
        columns = keep_topk(scores, budget, newest)
        index = columns[:, None, :, None]
        store.keys = view.keys.gather(2, index.expand(-1, kv_heads, -1, view.keys.shape[-1]))
        store.values = view.values.gather(2, index.expand(-1, kv_heads, -1, view.values.shape[-1]))
        keep.columns[view.layer], keep.scores[view.layer] = columns, scores
        return ShortLayer(store, columns, length, keep.valid)


def _every_column(keys: Tensor, count: int) -> Tensor:
    """(batch, count) column numbers for keys (batch, kv_heads, columns, head_dim)."""
    return torch.arange(count, device=keys.device).expand(len(keys), -1)


def _kept(cache: Cache) -> KeepMap | None:
    """What is left of the prompt in each layer that holds all later tokens; None where nothing was cut."""
    short = [layer for layer in cache.layers if isinstance(layer, ShortLayer) and layer.length]
    if not short:
        return None
    keep = KeepMap(short[0].length, short[0].valid)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, ShortLayer):
            keep.columns[i] = layer.columns
        elif type(layer) is DynamicLayer and layer.keys is not None:
            keep.columns[i] = _every_column(layer.keys, keep.length)
    return keep


def _check_positions(given: Tensor, keep: KeepMap, mask: Tensor | None, seen: int) -> None:
    """Refuse positions (batch or 1, new) that do not go on from all tokens that were seen, with or without padding."""
    if given.dim() != 2:  # several for a token, as vision-language models have them
        return
    columns = torch.arange(seen, seen + given.shape[1], device=given.device)[None]
    padding = 0 if keep.valid is None else (~keep.valid).sum(1, keepdim=True).to(given.device)
    places = columns - padding if mask is None else mask.long().cumsum(1)[:, seen:] - 1
    hidden = torch.zeros_like(columns, dtype=torch.bool) if mask is None else ~mask[:, seen:].bool()
    if not any(bool(((given == right) | hidden).all()) for right in (columns, places)):
        raise InputError(
            f"a token is given position {int(given[0, 0])} after {seen} that were seen; count those that were evicted "
            "too, or leave position_ids out"
        )


def _newest_rows(call: AttentionCall) -> Callable[[int, Sequence[int]], Tensor]:
    """`LayerView.attention` of a prefill."""
    length = call.query.shape[2]
    return lambda w, heads: call.rows(slice(length - w, None), torch.as_tensor(heads))
