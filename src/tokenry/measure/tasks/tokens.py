"""The task `tokens`: how many tokens a tokenizer needs for text of several kinds, and how well its cuts withstand
recognition errors."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...tokenize.text.measures import boundary_stability, token_counts
from ...tokenize.text.noise import ocr_errors
from ...tokenize.text.report import token_pieces
from ..task import Arm, Metric, Outcome, Sample

__all__ = ["TokensTask"]

SHOWN = 200  # characters of a sample that the report shows cut
PER_CHARACTER = "tokens per character: tokens of a document / mean characters of a document of this set"


class TokensTask:
    """Documents of several sets, and short texts that are corrupted; an arm's `apply` is a tokenizer.

    The mean of a set's metric over its documents is its tokens per character, sum over sum. Metrics of other sets are
    NaN. The seed is that of the recognition errors.

    Args:
        sets: {"licenses": documents, "docstrings": ..., "code": ...}.
        new: for each license whether it is no near-copy of a training text; those also count as "new_licenses".
        clean: texts of up to a few hundred characters, for boundary stability.
        error_rate: recognition errors per character.
    """

    slug: ClassVar[str] = "tokens"
    stage: ClassVar[str] = "tokenize"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("licenses", "lower", f"held-out licenses, {PER_CHARACTER}"),
        Metric("new_licenses", "lower", f"held-out licenses that are no near-copies of training text, {PER_CHARACTER}"),
        Metric("docstrings", "lower", f"held-out docstrings, {PER_CHARACTER}"),
        Metric("code", "lower", f"held-out Python code, {PER_CHARACTER}"),
        Metric("clean", "lower", f"the texts that are corrupted, before it, {PER_CHARACTER}"),
        Metric("boundary_stability", "higher", "Jaccard index of token ends with and without recognition errors"),
    )

    def __init__(
        self,
        sets: Mapping[str, Sequence[str]],
        new: Sequence[bool],
        clean: Sequence[str],
        error_rate: float = 0.05,
    ) -> None:
        self.error_rate = error_rate
        self._samples = [
            Sample(f"{name}-{i:04}", text, {"sets": [name]})
            for name, texts in {**sets, "clean": clean}.items()
            for i, text in enumerate(texts)
        ]
        for sample, is_new in zip((s for s in self._samples if "licenses" in s.data["sets"]), new, strict=True):
            sample.data["sets"] += ["new_licenses"] * is_new
        lengths: dict[str, list[int]] = {}
        for sample in self._samples:
            for name in sample.data["sets"]:
                lengths.setdefault(name, []).append(len(sample.prompt))
        self.characters = {name: float(np.mean(of_set)) for name, of_set in lengths.items()}
        self.setting = {"error_rate": error_rate, "characters": self.characters}

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        return [self._run(arm.apply, sample, seed) for sample in samples]

    def _run(self, tokenizer: PreTrainedTokenizerBase, sample: Sample, seed: int) -> Outcome:
        start = time.perf_counter()
        (tokens,) = token_counts(tokenizer, [sample.prompt])
        seconds = time.perf_counter() - start
        metrics = {metric.name: float("nan") for metric in self.metrics}
        metrics.update({name: tokens / self.characters[name] for name in sample.data["sets"]})
        shown = sample.prompt[:SHOWN]
        if "clean" in sample.data["sets"]:
            shown = ocr_errors(sample.prompt, self.error_rate, f"{sample.id}-{seed}")
            metrics["boundary_stability"] = boundary_stability(tokenizer, [(shown, sample.prompt)])
        cut = "|".join(piece.text for piece in token_pieces(tokenizer, shown))
        return Outcome(metrics, {"seconds": seconds}, {"note": cut})
