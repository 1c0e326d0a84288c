"""The loss of offline SARSA on the values of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...core.errors import InputError

__all__ = ["sarsa_loss"]


def sarsa_loss(
    q: Tensor,
    target_q: Tensor,
    input_ids: Tensor,
    rewards: Tensor,
    attention_mask: Tensor,
    gamma: float = 1.0,
    q_min: float = -1.0,
    q_max: float = 0.0,
) -> Tensor:
    """Squared error of Q(prefix, next token) to what came after it (arXiv 2302.14003).

    The target is the reward of the next token plus gamma times the averaged head's value of the token after that, and
    the reward alone for the last token; it is clamped and carries no gradient. The sum is divided by the number of
    tokens that are no padding, as in the official code (one more per text than there are transitions).

    Args:
        q, target_q: (batch, time, vocab), after each token, for every next one.
        input_ids, attention_mask: (batch, time), padded on the right.
        rewards: (batch,) at the end of each text, or (batch, time) for each token; in [-1, 0].

    Raises:
        InputError: a text of fewer than two tokens, padding elsewhere, or a reward outside [-1, 0].
    """
    mask = attention_mask.bool()
    lengths = mask.sum(1)
    if int(lengths.min()) < 2:
        raise InputError("a text has fewer than two tokens, so no token follows another; leave it out")
    if bool((~mask[:, :-1] & mask[:, 1:]).any()):
        raise InputError("a row is padded on the left or inside; pad on the right")
    actions, taken = input_ids[:, 1:, None], mask[:, 1:]  # the last real token is an action, even where it is padding
    value = q[:, :-1].gather(-1, actions).squeeze(-1)
    with torch.no_grad():
        after = target_q[:, :-1].gather(-1, actions).squeeze(-1)[:, 1:] * taken[:, 1:]
        after = nn.functional.pad(after, (0, 1))  # nothing comes after the last token
        target = (_each_token(rewards, lengths, mask) + gamma * after).clamp(q_min, q_max)
    return ((value - target).square() * taken).sum() / mask.sum()


def _each_token(rewards: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
    """Rewards of the tokens from the second on, (batch, time - 1)."""
    if bool(((rewards < -1) | (rewards > 0) | rewards.isnan()).any()):
        raise InputError(
            f"rewards from {float(rewards.min())} to {float(rewards.max())} are not allowed; give numbers in [-1, 0]"
        )
    if rewards.dim() == 1:
        last = torch.arange(1, mask.shape[1], device=mask.device) == lengths[:, None] - 1
        return last * rewards[:, None]
    return rewards[:, 1:] * mask[:, 1:]
