"""The directions of MLP neurons in the residual stream, and their product with the output head.

`top_tokens` is the computation: one pass over the vocabulary in tiles that stay in the processor's cache. Each tile of
logits is reduced to the largest of every eight tokens and to a sum of exponentials, and then forgotten. The best k
tokens of a neuron lie in the k groups of eight with the largest maxima, so only those are computed a second time.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...core.errors import InputError
from ...models.anatomy import decoder_body, decoder_layers, down_projection, effective_weight, gated_mlp, unwrapped

__all__ = ["Side", "Spread", "TopTokens", "neuron_rows", "top_tokens"]


GROUP = 8  # tokens that share one maximum
TILE = 1024  # tokens of a tile of logits
SLICE = 16  # neurons whose best groups are computed again at a time
Side = Literal["up", "gate", "down"]


# --- weights -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def neuron_rows(model: PreTrainedModel, layer: int, side: Side = "up", fold_norm: bool = False) -> Tensor:
    """The directions (neurons, width) of an MLP's neurons in the residual stream, float32, on the head's device.

    Args:
        side: "up" and "gate" are rows of the input projections, "down" the columns of the output projection.
        fold_norm: multiply by the gain of the norm before the MLP (for "down": of the model's last norm).

    Raises:
        InputError: no gated MLP, a mixture of experts, quantized or offloaded weights, no such norm.
    """
    gated = gated_mlp(model, layer)
    if side == "down":
        rows = effective_weight(down_projection(model, layer), f"mlp.down_proj of layer {layer}").T
        norm = getattr(decoder_body(model), "norm", None)
    else:
        rows = effective_weight(gated[side].module, f"the {side}-projection of layer {layer}")[gated[side].outputs]
        norm = _norm_before_mlp(decoder_layers(model)[layer])
    rows = rows.float()
    if fold_norm:
        if norm is None:
            raise InputError(f"{type(model).__name__} has no norm to fold in there; give fold_norm=False")
        rows = rows * norm_gain(norm, rows.shape[1]).to(rows.device)
    head = cast(nn.Module, model.get_output_embeddings())
    return rows.to(cast(Tensor, unwrapped(head).weight).device)


def _norm_before_mlp(block: nn.Module) -> nn.Module | None:
    """The norm whose output the MLP reads; with a norm after the MLP only, there is none."""
    if hasattr(block, "pre_feedforward_layernorm"):  # Gemma 2 and later
        return cast(nn.Module, block.pre_feedforward_layernorm)
    if hasattr(block, "post_feedforward_layernorm"):  # OLMo 2
        return None
    return getattr(block, "post_attention_layernorm", None)


def norm_gain(norm: nn.Module, width: int) -> Tensor:
    """What a norm multiplies each direction by (width,): its weight, or 1 + weight in Gemma, measured and not guessed.

    On a vector of alternating signs, mean 0 and mean square 1, a norm does nothing but that (and add its bias).
    """
    signs = torch.ones(width, dtype=next(norm.parameters()).dtype, device=next(norm.parameters()).device)
    signs[1::2] = -1
    return ((norm(signs[None]) - norm(-signs[None]))[0] / 2 * signs).float()


# --- the product ---------------------------------------------------------------------------------------------------


class TopTokens(NamedTuple):
    """Per row: the best tokens (n, k) int32 with their logits, best first, and the log-sum-exp of all logits (n,).

    `bottom_ids` and `bottom_logits` are the same for the negated row (the logits are those of the row itself).
    """

    ids: Tensor
    logits: Tensor
    lse: Tensor
    bottom_ids: Tensor | None
    bottom_logits: Tensor | None


@torch.no_grad()
def top_tokens(rows: Tensor, head: Tensor, k: int, bottom: bool = False) -> TopTokens:
    """The k largest entries of each row of rows @ head.T, and its log-sum-exp, without that matrix (arXiv 2501.02688).

    Args:
        rows: (n, width) float32.
        head: (vocabulary, width), any float dtype; products are float32.
        k: 1 to vocabulary.
        bottom: also the k smallest.

    Memory: n * vocabulary / 8 floats and one tile.
    """
    n, vocabulary = len(rows), len(head)
    groups = -(-vocabulary // GROUP)
    highs = rows.new_empty(groups, n)
    lows = rows.new_empty(groups, n) if bottom else None
    tile = rows.new_empty(min(TILE, vocabulary), n)
    columns = (rows * math.log2(math.e)).T  # logits in bits: exp2 is three times faster here than exp
    shift, total = rows.new_full((n,), -math.inf), rows.new_zeros(n)
    for start in range(0, vocabulary, TILE):
        part = head[start : start + TILE].float()
        logits = torch.mm(part, columns, out=tile[: len(part)])
        where = slice(start // GROUP, start // GROUP - (-len(part) // GROUP))
        highs[where] = _extremes(logits, largest=True)
        if lows is not None:
            lows[where] = _extremes(logits, largest=False)
        raised = torch.maximum(shift, highs[where].amax(0))
        total = total * (shift - raised).exp2() + logits.sub_(raised).exp2_().sum(0)
        shift = raised
    best = _best_of_groups(rows, head, highs, k, 1)
    worst = _best_of_groups(rows, head, lows.neg_(), k, -1) if lows is not None else (None, None)
    return TopTokens(*best, (shift + total.log2()) * math.log(2), *worst)


def _extremes(logits: Tensor, largest: bool) -> Tensor:
    """The largest or smallest of every GROUP rows of (tokens, n)."""
    missing = -len(logits) % GROUP
    if missing:
        logits = nn.functional.pad(logits, (0, 0, 0, missing), value=-math.inf if largest else math.inf)
    grouped = logits.view(-1, GROUP, logits.shape[1])
    return grouped.amax(1) if largest else grouped.amin(1)


def _best_of_groups(rows: Tensor, head: Tensor, peaks: Tensor, k: int, sign: int) -> tuple[Tensor, Tensor]:
    """The k best tokens of sign * logits, given the best of each group (groups, n): they lie in the k best groups."""
    chosen = peaks.T.contiguous().topk(min(k, len(peaks))).indices
    inside = torch.arange(GROUP, device=rows.device)
    ids, values = [], []
    for start in range(0, len(rows), SLICE):
        tokens = (chosen[start : start + SLICE, :, None] * GROUP + inside).flatten(1)
        beyond = tokens >= len(head)
        tokens = tokens.clamp(max=len(head) - 1)
        directions = head.index_select(0, tokens.flatten()).view(*tokens.shape, -1).float()
        logits = (directions @ rows[start : start + SLICE, :, None]).squeeze(-1) * sign
        top = logits.masked_fill_(beyond, -math.inf).topk(k)
        ids.append(tokens.gather(1, top.indices).int())
        values.append(top.values * sign)
    return torch.cat(ids), torch.cat(values)


class Spread(NamedTuple):
    """Mean (width,) and covariance (width, width) of the head's rows: they give mean and deviation of any logits."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, head: Tensor) -> Spread:
        mean = head.float().mean(0)
        covariance = torch.zeros(len(mean), len(mean), device=head.device)
        for part in head.split(4 * TILE):
            centered = part.float() - mean
            covariance.addmm_(centered.T, centered)
        return cls(mean, covariance / len(head))

    def deviation(self, rows: Tensor) -> Tensor:
        """Standard deviation over the vocabulary of each row's logits (n,)."""
        return (rows @ self.covariance).mul_(rows).sum(1).clamp_(min=0).sqrt()
