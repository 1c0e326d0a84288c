"""From scores to tokens: temperature and truncation, and one generator for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, cast

import torch
from torch import Tensor
from transformers.generation import logits_process
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

WARPERS = tuple(
    getattr(logits_process, f"{name}LogitsWarper")
    for name in ("Temperature", "TopP", "TopK", "TopH", "MinP", "Typical", "Epsilon", "Eta")
    if hasattr(logits_process, f"{name}LogitsWarper")
)
KEPT_BY_ROW = {  # what processors of transformers keep for each row of the batch
    RepetitionPenaltyLogitsProcessor: "prompt_ignore_length",
    EncoderRepetitionPenaltyLogitsProcessor: "encoder_input_ids",
    EncoderNoRepeatNGramLogitsProcessor: "generated_ngrams",
}


class Sampler:
    """Turns scores into tokens. With a seed every row has its own generator, so a batch does not change a row."""

    def __init__(
        self,
        warpers: Sequence[LogitsProcessor],
        sample: bool,
        seed: int | None,
        batch: int,
        device,
        final_processors: Sequence[LogitsProcessor] = (),
    ) -> None:
        self.warpers: list[Callable[..., Tensor]] = list(warpers)
        self.final_processors: list[Callable[..., Tensor]] = list(final_processors)
        self.sample = sample
        self.generators = None
        if seed is not None:
            self.generators = [torch.Generator(device).manual_seed(row_seed(seed, b)) for b in range(batch)]

    def warp(self, ids: Tensor, scores: Tensor, level: int = 0) -> Tensor:
        for warper in (*self._relaxed(level), *self.final_processors):
            scores = warper(ids, scores)
        return scores

    def draw(self, scores: Tensor) -> Tensor:
        """One token per row from warped scores (batch, vocab)."""
        if not self.sample:
            return scores.argmax(-1)
        probabilities = scores.softmax(-1)
        if self.generators is None:
            return torch.multinomial(probabilities, 1).squeeze(1)
        return torch.stack([self._multinomial(p, b) for b, p in enumerate(probabilities)])

    def redraw(self, row: int, ids: Tensor, scores: Tensor, level: int, invert: bool) -> tuple[int, Tensor]:
        """Another draw for one row (vocab,): the token, and the probabilities (before inverting)."""
        warped = self.warp(ids, scores[None], level)[0]
        probabilities = warped.softmax(-1)
        if not self.sample:
            return int(probabilities.argmax()), probabilities
        used = probabilities
        if invert:
            alive = probabilities[probabilities > 0]
            used = torch.where(probabilities > 0, alive.max() - probabilities + alive.min(), 0.0)
        return int(self._multinomial(used, row)), probabilities

    def _multinomial(self, probabilities: Tensor, row: int) -> Tensor:
        generator = self.generators[row] if self.generators else None
        return torch.multinomial(probabilities, 1, generator=generator)[0]

    def _relaxed(self, level: int) -> list[Callable[..., Tensor]]:
        order = ("Temperature", "MinP", "TopP", "TopK")[:level]
        return [w for w in self.warpers if not type(w).__name__.startswith(order)] if level else self.warpers


def of_row(processor: Callable[..., Tensor], row: int, batch: int) -> Callable[..., Tensor]:
    """The processor for one row of the batch that comes alone: some know rows by their number."""
    if batch == 1:
        return processor
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
    kept = getattr(processor, KEPT_BY_ROW.get(type(processor), ""), None)
    if kept is None or isinstance(kept, int):
        return processor
    own, place = cast(Any, copy(processor)), row * len(kept) // batch  # several rows may continue one prompt
    setattr(own, KEPT_BY_ROW[type(processor)], kept[place : place + 1])
    own.batch_size = 1
    return own


def row_seed(seed: int, row: int) -> int:
    """Seed of a row: the seed itself for row 0, so that a single row equals `torch.manual_seed(seed)`."""
    return (seed + row * 0x9E3779B97F4A7C15) % 2**63
