"""Log-probabilities as the model gives them, kept for as long as a rewind may put another token at their position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["UNKNOWN", "KnownLogprobs", "Ranked"]

UNKNOWN = -9999.0  # as in OpenAI's answers: a method has put the token there, and the model was not asked


class KnownLogprobs:
    """What is known at one position, before it is settled which token stands there.

    Args:
        logits: (vocabulary,), before processors.
        count: how many of the likeliest are told.
    """

    def __init__(self, logits: Tensor, count: int) -> None:
        self.values = logits.log_softmax(-1)
        best = self.values.topk(min(count, len(self.values)))
        self.top = dict(zip(best.indices.tolist(), best.values.tolist()))
        self.tokens: Tensor | None = None  # those that `values` are of; None: all

    def keep(self, tokens: Sequence[int]) -> None:
        """Only these tokens can still come here."""
        self.tokens = torch.tensor(tokens, device=self.values.device)
        self.values = self.values[self.tokens]

    def of(self, token: int) -> float:
        """The log-probability of a token."""
        if self.tokens is None:
            return float(self.values[token])
        found = self.values[self.tokens == token]
        return float(found[0]) if len(found) else UNKNOWN


@dataclass(frozen=True)
class Ranked:
    """The log-probability of a token as the model gives it, before processors and bias, and the likeliest ones there
    {id: log-probability}. A token that a method has put there without asking the model has -9999.0, and none."""

    token: int
    logprob: float
    top: Mapping[int, float]

    @classmethod
    def of(cls, token: int, known: KnownLogprobs | None) -> Ranked:
        return cls(token, UNKNOWN, {}) if known is None else cls(token, known.of(token), known.top)
