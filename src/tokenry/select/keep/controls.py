"""Scorers that know nothing: the controls that a method must beat."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .keep_map import LayerView, TokenScorer

__all__ = ["FirstLast", "LowestScore", "Random", "UniformStride"]


@dataclass(frozen=True)
class Random:
    """Control: any tokens, other ones in every layer."""

    seed: int = 0
    reads_attention: bool = field(default=False, init=False)

    def score(self, view: LayerView) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + view.layer)
        batch, _, length, _ = view.keys.shape
        return torch.rand(batch, length, generator=generator).to(view.keys.device)


@dataclass(frozen=True)
class FirstLast:
    """Control: the first `sinks` tokens and the most recent ones, as in StreamingLLM."""

    sinks: int = 4
    reads_attention: bool = field(default=False, init=False)

    def score(self, view: LayerView) -> Tensor:
        place = view.places()
        return torch.where(place < self.sinks, place.shape[1] + self.sinks - place, place).float()


@dataclass(frozen=True)
class UniformStride:
    """Control: evenly spread tokens. Bit-reversed order spreads any number of them without knowing how many."""

    reads_attention: bool = field(default=False, init=False)

    def score(self, view: LayerView) -> Tensor:
        place = view.places()
        bits = max(1, (place.shape[1] - 1).bit_length())
        turned = (((place >> i) & 1) << (bits - 1 - i) for i in range(bits))
        reversed_place = sum(turned, torch.zeros_like(place))
        return -reversed_place.float()


@dataclass(frozen=True)
class LowestScore:
    """Control: keep what `scorer` values least. Must be the worst of all."""

    scorer: TokenScorer

    @property
    def reads_attention(self) -> bool:
        return self.scorer.reads_attention

    def score(self, view: LayerView) -> Tensor:
        return -self.scorer.score(view)
