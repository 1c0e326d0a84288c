"""Logits processors that add a bias to a few tokens until thinking ends.

Everything is computed from the ids of the row, never from a counter: rewinds and unequal rows need no care. A bias is
added to raw logits, before temperature and top-p; it multiplies the odds of a token against any other by exp(bias).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.errors import InputError
from ..generation.continuation import ContinuationLogitsProcessor

__all__ = ["BiasLogitsProcessor", "checked_ids"]


class BiasLogitsProcessor(ContinuationLogitsProcessor):
    """Adds one number per row to the logits of a few tokens, until the row has ended thinking. A bias depends on how
    many tokens are generated."""

    def __init__(
        self, token_ids: Sequence[int], end_think_ids: Sequence[int] | None, prompt_length: int | None = None
    ) -> None:
        super().__init__(prompt_length)
        self.token_ids = tuple(dict.fromkeys(checked_ids("token_ids", token_ids)))  # each biased once
        self.end_think_ids = None if end_think_ids is None else checked_ids("end_think_ids", end_think_ids)

    def bias(self, generated: Tensor) -> Tensor:
        """What to add, in logits, for each row of generated ids (batch, t): (batch,), float32."""
        raise NotImplementedError

    def change(self, generated: Tensor, scores: Tensor) -> Tensor:
        """Scores with the bias added; `scores` itself where there is no bias."""
        if max(self.token_ids) >= scores.shape[-1]:
            raise InputError(
                f"token id {max(self.token_ids)} is outside the model's vocabulary of {scores.shape[-1]}; "
                "take the ids from this model's tokenizer"
            )
        bias = self.bias(generated).masked_fill(self._ended(generated), 0.0)
        if not bool(bias.any()):
            return scores
        ids = torch.tensor(self.token_ids, device=scores.device)
        return scores.float().index_add(1, ids, bias[:, None].expand(-1, len(ids)))

    def _ended(self, generated: Tensor) -> Tensor:
        """Rows (batch,) whose generated ids hold the whole end mark. In a prompt it does not count."""
        if self.end_think_ids is None or generated.shape[1] < len(self.end_think_ids):
            return torch.zeros(generated.shape[0], dtype=torch.bool, device=generated.device)
        mark = torch.tensor(self.end_think_ids, device=generated.device)
        return (generated.unfold(1, len(mark), 1) == mark).all(-1).any(-1)


def checked_ids(name: str, ids: Sequence[int]) -> tuple[int, ...]:
    """The ids in order, as a tuple; refused if there are none or one is negative."""
    if not ids:
        raise InputError(f"{name} is empty; give at least one token id")
    if any(i < 0 for i in ids):
        raise InputError(f"{name} has {min(ids)}; give token ids >= 0")
    return tuple(ids)
