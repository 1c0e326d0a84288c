"""TIP: a penalty on thought-switching words near the start of each thought. A baseline of CyclicReflex.

Paper: Thoughts Are All Over the Place: On the Underthinking of o1-Like LLMs, arXiv 2501.18585.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..core.fields import Logits, require
from .reasoning.bias import BiasLogitsProcessor
from .reasoning.reflection import ReflectionMethod

__all__ = ["ThoughtSwitchPenalty", "ThoughtSwitchPenaltyLogitsProcessor"]


class ThoughtSwitchPenalty(ReflectionMethod):
    """TIP: a penalty on thought-switching words near the start of each thought."""

    slug: ClassVar[str] = "tip"
    title: ClassVar[str] = "TIP (thought switching penalty)"
    paper: ClassVar[str] = "Thoughts Are All Over the Place: On the Underthinking of o1-Like LLMs, arXiv 2501.18585"
    claim: ClassVar[str] = "Reasoning models solve more problems when they are kept from switching thoughts too early."

    alpha: Logits = Field(3.0, description="penalty in logits; 0 does nothing")
    beta: float = Field(600, ge=0, le=2**20, description="tokens of a thought that it lasts; 0 does nothing")
    per_thought: bool = Field(True, description="start again at every switch word; false: only at the first token")

    def _build(
        self, token_ids: Sequence[int], end_think_ids: Sequence[int] | None, prompt_length: int | None
    ) -> BiasLogitsProcessor:
        return ThoughtSwitchPenaltyLogitsProcessor(
            token_ids, self.alpha, self.beta, self.per_thought, end_think_ids, prompt_length
        )


class ThoughtSwitchPenaltyLogitsProcessor(BiasLogitsProcessor):
    """TIP: takes `alpha` off the logits of thought-switching tokens for `beta` tokens (arXiv 2501.18585).

    Args:
        token_ids: the switch tokens.
        alpha: penalty in logits, >= 0.
        beta: how long it lasts, in tokens, >= 0.
        per_thought: count from the last switch token (the paper); False counts from the first token only, as the
            re-implementation in the CyclicReflex code does.
        end_think_ids, prompt_length: as for the wave.

    Raises:
        InputError: ids empty or negative, alpha or beta out of range.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        alpha: float = 3.0,
        beta: float = 600,
        per_thought: bool = True,
        end_think_ids: Sequence[int] | None = None,
        prompt_length: int | None = None,
    ) -> None:
        super().__init__(token_ids, end_think_ids, prompt_length)
        require(0 <= alpha <= 1e30, "alpha", alpha, "a number in [0, 1e30], which float32 holds")
        require(beta >= 0, "beta", beta, "a number of tokens >= 0")
        self.alpha, self.beta, self.per_thought = alpha, beta, per_thought

    def bias(self, generated: Tensor) -> Tensor:
        age = generated.shape[1] - self._thought_start(generated)
        return torch.where(age < self.beta, -float(self.alpha), 0.0).to(torch.float32)

    def _thought_start(self, generated: Tensor) -> Tensor:
        """Position (batch,) of the newest switch token; 0 before the first."""
        batch, t = generated.shape
        if not self.per_thought or t == 0:
            return torch.zeros(batch, dtype=torch.long, device=generated.device)
        switch = torch.isin(generated, torch.tensor(self.token_ids, device=generated.device))
        return (switch * torch.arange(t, device=generated.device)).amax(-1)
