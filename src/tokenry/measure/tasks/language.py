"""The task `language`: bits per character of a language model on sentences that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...models.batch import right_padded
from ..task import Arm, Metric, Outcome, Sample, Statistic

__all__ = ["BITS_PER_CHARACTER", "LanguageTask", "Speaker", "framed"]

BATCH = 32


class Speaker(NamedTuple):
    """A model of whole texts, between two marks: the id that follows those of its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def framed(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text with a mark before and after it."""
    mark = len(tokenizer)
    return [[mark, *ids, mark] for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]


def _per_character(metrics: Mapping[str, np.ndarray]) -> float:
    return float(np.nansum(metrics["bits"]) / np.nansum(metrics["characters"]))


BITS_PER_CHARACTER = Statistic(
    "bits_per_character", "lower", "bits for each character, over all sentences", _per_character
)


class LanguageTask:
    """Sentences; an arm's `apply` gives the `Speaker` of a seed.

    It is called, and trains, for every batch, so a batch should hold all samples.
    """

    slug: ClassVar[str] = "language"
    stage: ClassVar[str] = "tokenize"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("bits", "lower", "bits of a sentence and its end"),
        Metric("characters", None, "characters of a sentence"),
        Metric("pieces", None, "tokens of a sentence"),
    )

    def __init__(self, texts: Sequence[str]) -> None:
        self._samples = [Sample(f"{i:04}", text) for i, text in enumerate(texts)]

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        of_seed: Callable[[int], Speaker] = arm.apply
        model, tokenizer = of_seed(seed)
        rows = framed(tokenizer, [sample.prompt for sample in samples])
        return [
            Outcome({"bits": bits, "characters": len(sample.prompt), "pieces": len(row) - 2})
            for sample, row, bits in zip(samples, rows, bits_of(model, rows), strict=True)
        ]


@torch.no_grad()
def bits_of(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[float]:
    """Bits of each row behind its first token."""
    found = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # little padding
    for start in range(0, len(rows), BATCH):
        batch = order[start : start + BATCH]
        ids, present = right_padded([rows[i] for i in batch])
        logits = model(input_ids=ids, attention_mask=present.long(), use_cache=False).logits[:, :-1]
        nats = cross_entropy(logits.float().transpose(1, 2), ids[:, 1:], reduction="none") * present[:, 1:]
        for i, bits in zip(batch, (nats.sum(1) / math.log(2)).tolist()):
            found[i] = bits
    return found
