"""The states of the last token of every row, without those of the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models.anatomy import decoder_body, decoder_layers
from ..models.batch import position_arguments
from .layers import skip_layers
from .residual import edit_inputs, edit_residual

__all__ = ["last_states", "last_tokens"]


def last_tokens(mask: Tensor) -> Tensor:
    """(batch,) index of the last real token of a (batch, time) mask, padded on either side."""
    return mask.shape[1] - 1 - mask.flip(1).long().argmax(1)


def last_states(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, wanted: Sequence[int], final_norm: bool = True
) -> Tensor:
    """The residual state of every row's last real token after `wanted` numbers of layers.

    Args:
        ids, mask: (batch, time), padded on either side.
        wanted: 0 is the input of the first layer, k the output of layer k - 1. Layers behind the last one do not run.
        final_norm: whether the output of all layers is that after the final norm, as in the `hidden_states` of
            transformers; else before, as `Trace.hidden` counts.

    Returns:
        (batch, len(wanted), width).
    """
    layers, body, caught = decoder_layers(model), decoder_body(model), {}
    count, deepest = len(layers), max(wanted)
    rows = torch.arange(len(ids), device=ids.device)
    last = last_tokens(mask)

    def keep(index: int) -> Callable[[Tensor], Tensor]:
        def look(hidden: Tensor) -> Tensor:
            caught[index] = hidden[rows.to(hidden.device), last.to(hidden.device)]
            return hidden

        return look

    with ExitStack() as stack:
        if deepest < count:
            stack.enter_context(skip_layers(model, range(deepest)))
        stack.enter_context(edit_inputs(model, {layers[k]: keep(k) for k in wanted if k < count}))
        if count in wanted and not final_norm:
            stack.enter_context(edit_residual(model, {count - 1: keep(count)}))
        final = body(
            input_ids=ids, attention_mask=mask, use_cache=False, **position_arguments(body, mask)
        ).last_hidden_state
    if final_norm:
        keep(count)(final)
    device = final.device
    return torch.stack([caught[k].to(device) for k in wanted], 1)
