"""Preference losses on the logits at one position: FTPO, and DPO on one-token completions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.errors import InputError

__all__ = ["FTPOOutput", "choice_win", "final_token_dpo_loss", "ftpo_loss", "others", "target_ids"]


class FTPOOutput(NamedTuple):
    """The loss, its four parts before weighting, and the share of chosen tokens above the rejected one."""

    loss: Tensor
    pref: Tensor
    nontarget: Tensor
    target: Tensor
    aggregate: Tensor
    choice_win: Tensor


def ftpo_loss(
    logits: Tensor,
    ref_logits: Tensor,
    chosen_ids: Tensor,
    chosen_mask: Tensor,
    rejected_ids: Tensor,
    margin: float = 2.0,
    lambda_nontarget: float = 0.4,
    lambda_target: float = 0.05,
    tau_target: float = 1.0,
    lambda_aggregate: float = 0.0,
    tau_aggregate: float = 2.0,
    temperature: float = 1.0,
) -> FTPOOutput:
    """Final Token Preference Optimization (arXiv 2510.15061).

    The preference term is one ratio over the whole batch, so the loss of a batch is not the mean over its rows.

    Args:
        logits, ref_logits: (batch, vocab) at the last position, of the policy and of the reference.
        chosen_ids, chosen_mask: (batch, chosen), padded where the mask is False.
        rejected_ids: (batch,).
        margin: logits by which a chosen token must beat the rejected one.
        tau_target: drift of a chosen or rejected logit that costs nothing, in logits.
        tau_aggregate: the same for their mean.
        temperature: softness of the preference term.
    """
    if margin <= 0:
        raise InputError(f"margin={margin} is not allowed; give a number of logits > 0")
    y, reference = logits.float(), ref_logits.float()  # differences of large logits vanish in bfloat16
    targets = target_ids(chosen_ids, chosen_mask, rejected_ids)
    real = F.pad(chosen_mask, (0, 1), value=True)
    at_targets = y.gather(1, targets)
    lead = at_targets[:, :-1] - at_targets[:, -1:]
    drift = y - reference
    at_drift = drift.gather(1, targets)
    outside = others(drift, targets)
    nontarget = (drift.square() * outside).sum() / outside.sum()
    target = ((at_drift.abs() - tau_target).clamp_min(0).square() * real).sum() / real.sum()
    mean_drift = (at_drift * real).sum(1) / real.sum(1)
    aggregate = (mean_drift.abs() - tau_aggregate).clamp_min(0).square().mean()
    pref = _preference(lead, chosen_mask, margin, temperature)
    loss = pref + lambda_nontarget * nontarget + lambda_target * target + lambda_aggregate * aggregate
    return FTPOOutput(loss, pref, nontarget, target, aggregate, choice_win(lead, chosen_mask))


def target_ids(chosen_ids: Tensor, chosen_mask: Tensor, rejected_ids: Tensor) -> Tensor:
    """(batch, chosen + 1): the chosen tokens, then the rejected one, which also stands in the padded places."""
    rejected = rejected_ids[:, None]
    return torch.cat([chosen_ids.where(chosen_mask, rejected), rejected], 1)


def others(logits: Tensor, targets: Tensor) -> Tensor:
    """(batch, vocab): 1 for every token that is no target, else 0."""
    return torch.ones_like(logits).scatter(1, targets, 0.0)


def _preference(lead: Tensor, mask: Tensor, margin: float, temperature: float) -> Tensor:
    """Pooled softplus of what is missing to the margin, weighted by how much is missing (with gradient).

    A row in which nothing is missing would have no weight at all; its chosen tokens then count 1 each.
    """
    weight = ((margin - lead) / margin).clamp(0, 1) * mask
    weight = torch.where(weight.sum(1, keepdim=True) < 1e-12, mask.to(weight.dtype), weight)
    missing = temperature * F.softplus((margin - lead) / temperature)
    return (weight * missing).sum() / weight.sum()


def choice_win(lead: Tensor, mask: Tensor) -> Tensor:
    """Share of chosen tokens with a lead (batch, chosen) over the rejected one above 0, mean over rows."""
    return (((lead > 0) & mask).sum(1) / mask.sum(1)).mean()


def final_token_dpo_loss(
    logits: Tensor,
    ref_logits: Tensor,
    chosen_ids: Tensor,
    chosen_mask: Tensor,
    rejected_ids: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """DPO on one-token completions, the mean over all (chosen, rejected) pairs: the baseline of FTPO.

    The normalisers of the two log-probabilities cancel, so logits are enough. Shapes as in `ftpo_loss`.
    """
    drift = logits.float() - ref_logits.float()
    gap = drift.gather(1, chosen_ids) - drift.gather(1, rejected_ids[:, None])
    return (-F.logsigmoid(beta * gap) * chosen_mask).sum() / chosen_mask.sum()
