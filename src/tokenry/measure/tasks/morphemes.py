"""The task `morphemes`: how many of a tokenizer's cuts inside words are borders of morphemes, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np

from ...data.turkish import Sentence
from ...tokenize.text.boundaries import cuts_in_text
from ..task import Arm, Metric, Outcome, Sample, Statistic

__all__ = ["BOUNDARY_F1", "Cutter", "MorphemesTask"]


class Cutter(NamedTuple):
    """What an arm does to text.

    Attributes:
        ends: the characters at which the tokens of a text end, one a token.
        back: what decoding gives of a text.
    """

    ends: Callable[[str], Sequence[int]]
    back: Callable[[str], str]


def _f1(metrics: Mapping[str, np.ndarray]) -> float:
    made, gold = np.nansum(metrics["made"]), np.nansum(metrics["gold"])
    return float(2 * np.nansum(metrics["shared"]) / (made + gold)) if made + gold else float("nan")


BOUNDARY_F1 = Statistic(
    "boundary_f1", "higher", "F1 of cuts inside words against the treebank's, over all words of letters", _f1
)


class MorphemesTask:
    """Sentences whose words are cut at derivations; an arm's `apply` is a `Cutter`."""

    slug: ClassVar[str] = "morphemes"
    stage: ClassVar[str] = "tokenize"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("shared", None, "cuts inside words that the treebank has too, in a sentence"),
        Metric("made", None, "cuts inside words, in a sentence"),
        Metric("gold", None, "cuts of the treebank, in a sentence"),
        Metric("pieces", "lower", "tokens of a sentence, with those of its spaces"),
        Metric("lossless", "higher", "share of sentences that decoding gives back as they were"),
    )

    def __init__(self, sentences: Sequence[Sentence]) -> None:
        self._samples = [Sample(f"{i:04}", s.text, {"words": s.words}) for i, s in enumerate(sentences)]

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        return [self._run(arm.apply, sample) for sample in samples]

    def _run(self, cutter: Cutter, sample: Sample) -> Outcome:
        text = sample.prompt
        ends = cutter.ends(text)
        cuts = cuts_in_text(text, sample.data["words"], ends)
        metrics = {**cuts._asdict(), "pieces": len(ends), "lossless": float(cutter.back(text) == text)}
        places = sorted({0, len(text), *ends})
        return Outcome(metrics, {}, {"note": "|".join(text[a:b] for a, b in pairwise(places))})
