"""Logits transforms for masked-diffusion sampling that need no history: guidance, and tokens that are forbidden."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.errors import InputError
from .loop import LogitsTransform
from .state import DiffusionState

__all__ = ["Forbid", "Guidance"]


class Forbid(LogitsTransform):
    """Never predicts these tokens. LLaDA forbids end of text where it would fill a wide window before the answer does.

    Raises:
        InputError: no tokens; when called, one outside the vocabulary.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise InputError("token_ids is empty; give the tokens that are forbidden")
        self.token_ids = list(token_ids)

    def __call__(self, logits: Tensor, state: DiffusionState) -> Tensor:
        size = logits.shape[-1]
        if not all(0 <= token < size for token in self.token_ids):
            raise InputError(f"token_ids={self.token_ids} are not all inside the vocabulary of {size}")
        return logits.index_fill(-1, torch.tensor(self.token_ids, device=logits.device), -torch.inf)


class Guidance(LogitsTransform):
    """Classifier-free guidance (LLaDA): u + (scale + 1) (logits - u), u being what is predicted when the prompt is
    hidden behind masks. Costs a second forward each step, over the whole row, which is counted like the first.

    Args:
        scale: >= 0; 0 changes nothing and costs nothing.

    Raises:
        InputError: scale out of range.
    """

    def __init__(self, scale: float) -> None:
        if not 0 <= scale < float("inf"):
            raise InputError(f"scale={scale} is not allowed; give a number >= 0")
        self.scale = scale

    def __call__(self, logits: Tensor, state: DiffusionState) -> Tensor:
        if not self.scale:
            return logits
        hidden = (state.columns < state.start) & state.present
        without = self.model.logits(state.x.masked_fill(hidden, self.model.mask_token_id), state.present)
        state.count(0, state.x.shape[1], state.working)
        # The mask token has -inf in both, and stays there.
        return torch.where(logits.isneginf(), logits, without + (self.scale + 1) * (logits - without))
