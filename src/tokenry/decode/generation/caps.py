"""Caps on the probabilities of next tokens: the nearest distribution under them, and the published approximation."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.errors import InputError

__all__ = ["cap_distribution", "cap_top_tokens", "iterate_caps"]

PASSES = 2  # of the processor that is published with arXiv 2302.14003


def cap_distribution(logp: Tensor, cap: Tensor) -> tuple[Tensor, Tensor]:
    """The distribution with p'(a) <= cap(a) that is nearest to p in KL(p' || p): p' = min(cap, c p), sum 1.

    Tokens without probability stay without. A row that meets its caps comes back as it is, bit for bit. Where all caps
    of the tokens with probability sum to less than 1, nothing can meet them: the caps themselves, divided by their sum,
    come back.

    Args:
        logp: log-probabilities (batch, vocab), or logits.
        cap: (batch, vocab), > 0.

    Returns:
        Log-probabilities (batch, vocab) in float32, and the rows (batch,) whose caps could not be met.
    """
    p = logp.double().softmax(-1)
    cap = torch.where(p > 0, cap.double(), 0.0)
    over = (p > cap).any(-1)
    infeasible = cap.sum(-1) < 1
    if not bool(over.any()):
        return logp.float(), infeasible
    capped = torch.minimum(cap, torch.where(p > 0, _factor(p, cap) * p, 0.0))
    capped = capped / capped.sum(-1, keepdim=True)  # which is 1 unless every token is at its cap
    return torch.where(over[:, None], capped.log().float(), logp.float()), infeasible


def _factor(p: Tensor, cap: Tensor) -> Tensor:
    """The smallest c >= 1 (batch, 1) with sum(min(cap, c p)) = 1; infinite where every token is at its cap.

    Tokens are capped in the order of cap / p. With the first k of them at their caps the others must be scaled by
    c_k = (1 - their caps) / (probability of the others); the first c_k that leaves the next token below its cap is it.
    """
    ratio, order = torch.where(p > 0, cap / p, torch.inf).sort(-1)
    sorted_p, sorted_cap = p.gather(-1, order), cap.gather(-1, order)
    rest_p = sorted_p.flip(-1).cumsum(-1).flip(-1)  # summed from the end: no difference of nearly equal numbers
    rest_cap = 1 - (sorted_cap.cumsum(-1) - sorted_cap)
    scale = torch.where(rest_p > 0, rest_cap / rest_p, torch.inf)
    fits = (scale <= ratio) & (sorted_p > 0)
    first = scale.gather(-1, fits.long().argmax(-1, keepdim=True))
    return torch.where(fits.any(-1, keepdim=True), first.clamp_min(1.0), torch.inf)


def cap_top_tokens(logp: Tensor, cap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`cap_distribution` for an API that lists only its k most likely tokens.

    All other tokens are one more outcome, which is not capped: their risks cannot be told apart.

    Args:
        logp, cap: (batch, k), of the listed tokens.

    Returns:
        New log-probabilities (batch, k), that of all other tokens together (batch,), and the rows (batch,) whose caps
        could not be met because nothing but the listed tokens had probability.

    Raises:
        InputError: the listed probabilities sum to more than 1.
    """
    listed = logp.double().exp().sum(-1)
    if bool((listed > 1 + 1e-4).any()):
        raise InputError(
            f"the listed probabilities sum to {float(listed.max()):.4f}; give log-probabilities, not logits"
        )
    other = (1 - listed).clamp_min(0).log()[:, None]
    whole, infeasible = cap_distribution(
        torch.cat([logp.double(), other], -1), torch.nn.functional.pad(cap, (0, 1), value=1.0)
    )
    return whole[:, :-1], whole[:, -1], infeasible


def iterate_caps(logits: Tensor, cap: Tensor) -> Tensor:
    """The published processor: logits (batch, vocab) cut at log(cap) + logsumexp, twice. Caps are not quite met."""
    scores = logits.float()
    for _ in range(PASSES):
        scores = torch.minimum(scores, cap.log() + scores.logsumexp(-1, keepdim=True))
    return scores
