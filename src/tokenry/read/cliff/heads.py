"""How much each attention head writes along a direction."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...core.errors import InputError
from ...hooks.residual import edit_inputs
from ...models.anatomy import decoder_layers, effective_weight, head_mixer
from ...models.batch import position_arguments

__all__ = ["head_contributions", "lowest"]


@torch.no_grad()
def head_contributions(
    model: PreTrainedModel, batch: Mapping[str, Tensor], direction: Tensor, position: int = -1
) -> Tensor:
    """What each head adds at one token, projected on w / ||w||: (layers, heads), float32, mean over the batch
    (arXiv 2510.06036).

    Args:
        batch: `input_ids` (batch, time) and `attention_mask`, padded on either side.
        direction: w (width,), in the residual stream before the last norm.
        position: which token of each row, counted without padding; -1 is the last.

    Raises:
        InputError: another width, a direction of length 0, several rows without a mask, a row that has no such token.
    """
    width = model.config.get_text_config().hidden_size
    if direction.shape != (width,) or not bool(direction.isfinite().all()) or not float(direction.norm()) > 0:
        raise InputError(
            f"a direction of shape {tuple(direction.shape)} is not allowed; give ({width},) numbers, not all 0"
        )
    columns = _columns(batch, position)
    rows, caught = torch.arange(len(columns), device=columns.device), {}

    def keep(layer: int, x: Tensor) -> Tensor:
        caught[layer] = x[rows, columns].float()
        return x

    depth = len(decoder_layers(model))
    mixers = [head_mixer(model, layer) for layer in range(depth)]
    with edit_inputs(model, {mixer: partial(keep, layer) for layer, (mixer, _) in enumerate(mixers)}):
        model(**_inputs(model, batch), use_cache=False, logits_to_keep=1)
    unit = (direction / direction.norm()).to(columns.device, torch.float32)
    found = []
    for layer, (mixer, head_dim) in enumerate(mixers):
        reads = unit @ effective_weight(mixer, f"o_proj of layer {layer}").float()  # (heads * head_dim,)
        found.append((caught[layer] * reads).unflatten(-1, (-1, head_dim)).sum(-1).mean(0))
    return torch.stack(found).cpu()


def _inputs(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None:
        return {"input_ids": ids}
    return {"input_ids": ids, "attention_mask": mask.long(), **position_arguments(model, mask)}


def _columns(batch: Mapping[str, Tensor], position: int) -> Tensor:
    """The column (batch,) of a token of each row, counted among those that are no padding."""
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None and len(ids) > 1:
        raise InputError(f"{len(ids)} rows without attention_mask may be padded; give the mask, too")
    present = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    lengths = present.sum(-1)
    shortest = int(lengths.min())
    if not -shortest <= position < shortest:
        raise InputError(f"position={position} is not allowed; the shortest row has {shortest} tokens")
    order = present.long().cumsum(-1) - 1
    wanted = position % lengths
    return ((order == wanted[:, None]) & present).long().argmax(-1)


def lowest(contributions: Tensor, count: int, layers: int) -> list[tuple[int, int, float]]:
    """The `count` heads (layer, head, contribution) that add the least, of the first `layers` layers."""
    heads = contributions.shape[1]
    values, places = contributions[:layers].flatten().sort()
    return [(p // heads, p % heads, v) for v, p in zip(values[:count].tolist(), places[:count].tolist())]
