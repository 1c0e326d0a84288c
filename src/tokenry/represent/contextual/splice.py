"""Put one vector into rows of token embeddings, and pool states."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from ...core.errors import InputError

__all__ = ["Pieces", "context_token_inputs", "masked_mean"]


@dataclass
class Pieces(ModelOutput):
    """What a forward gives.

    Attributes:
        embedding: (batch, 2 * width) or (batch, width), float32, of length 1.
        context_state, eos_state: (batch, width) final states; the first is empty without a Contextual token.
        context_token: (batch, width) what stood at the token.
    """

    embedding: Tensor | None = None
    context_state: Tensor | None = None
    eos_state: Tensor | None = None
    context_token: Tensor | None = None


def context_token_inputs(
    token_embeds: Tensor, context: Tensor, index: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (batch, time + 1, width) with one more token in each row, their mask, and its column (batch,).

    Args:
        token_embeds: (batch, time, width), padded on either side as `attention_mask` (batch, time) says.
        context: (batch, width).
        index: (batch,) real tokens of the row before it.

    Raises:
        InputError: an index outside a row.
    """
    lengths = attention_mask.long().sum(1)
    wrong = (index < 0) | (index > lengths)
    if bool(wrong.any()):
        row = int(wrong.long().argmax())
        raise InputError(
            f"context_index={int(index[row])} of row {row} is outside its text; give 0 to {int(lengths[row])}"
        )
    at = attention_mask.long().argmax(1) + index
    columns = torch.arange(token_embeds.shape[1] + 1, device=token_embeds.device)[None]
    here = columns == at[:, None]
    source = (columns - (columns > at[:, None]).long()).clamp(max=token_embeds.shape[1] - 1)
    spread = token_embeds.gather(1, source[..., None].expand(-1, -1, token_embeds.shape[-1]))
    embeds = torch.where(here[..., None], context.to(token_embeds.dtype)[:, None], spread)
    mask = attention_mask.gather(1, source).masked_fill(here, 1)
    return embeds, mask, at


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """(batch, width): the mean of (batch, time, width) over the real tokens of a (batch, time) mask."""
    weights = mask.to(states.dtype)[..., None]
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)
