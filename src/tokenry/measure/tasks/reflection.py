"""The task `reflection`: how often reflection words come, phase by phase of a wave, and how natural the text stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...decode.api import generate
from ...decode.cyclicreflex import triangular_wave
from ...decode.generation.sequence import SequenceState
from ..cost import Meter
from ..task import Arm, Metric, Outcome, Sample
from .generated import continuation_logprobs, generation_cost, shown_tokens

__all__ = ["BINS", "REFLECTION_PROMPTS", "ReflectionTask"]

BINS = 16  # equal parts of a period; quarters centred on the peak and the trough are whole bins
TOP, BOTTOM = range(BINS // 8, 3 * BINS // 8), range(5 * BINS // 8, 7 * BINS // 8)

REFLECTION_PROMPTS = (
    "Explain why some people prefer living in the city and others in the country.",
    "Describe how bread is made, from the field to the table.",
    "What are the good and bad sides of working from home?",
    "Tell the story of a day on a small fishing boat.",
    "Explain to a child how rain comes about.",
    "Compare trains and aeroplanes for a journey of 600 kilometres.",
    "Describe an old library and the people who visit it.",
    "Why do languages change over time?",
    "Give advice to somebody who wants to learn to play the piano at forty.",
    "Explain how a bicycle stays upright.",
    "What should a town do about too many cars?",
    "Describe the four seasons in a mountain village.",
    "How did people keep food fresh before refrigerators?",
    "Discuss whether homework helps pupils to learn.",
    "Tell how a neighbour found a lost dog in the snow.",
    "Explain what makes a good friend.",
    "Describe how a bridge over a wide river is planned and built.",
    "What are the reasons for and against keeping animals in zoos?",
    "Explain how the moon changes its shape during a month.",
    "Write about a walk through a market early in the morning.",
)


class ReflectionTask:
    """Texts of two periods, sampled at temperature 1 without truncation.

    An arm has a method, or an `apply`: keyword arguments for `tokenry.generate`. The phase of a token is its generated
    position within the period, for every arm alike. The rate of reflection tokens by phase is a number of the whole
    run, not of a sample, so `detail` holds the counts of each of the 16 phase bins.
    """

    slug: ClassVar[str] = "reflection"
    stage: ClassVar[str] = "decode"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("rate_top", None, "share of reflection tokens in the quarter where the wave is highest"),
        Metric("rate_bottom", None, "share of reflection tokens in the quarter where the wave is lowest"),
        Metric("reflection_rate", None, "share of reflection tokens in the whole text"),
        Metric("words", None, "words in the text"),
        Metric("logprob", "higher", "mean log-probability of a token under the plain model, in nats"),
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        token_ids: Sequence[int],
        period: float = 100.0,
        count: int = 20,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.token_ids = np.array(token_ids)
        self.period = period
        self.setting = {"token_ids": self.token_ids.tolist(), "period": period}
        self.prompts = REFLECTION_PROMPTS[:count]

    def samples(self) -> list[Sample]:
        return [Sample(f"reflection-{i:02d}", prompt) for i, prompt in enumerate(self.prompts)]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        first = int(samples[0].id.removeprefix("reflection-"))
        with Meter() as meter:
            output = generate(
                self.model,
                self.tokenizer,
                [s.prompt for s in samples],
                max_new_tokens=math.ceil(2 * self.period),
                seed=1000 * seed + first,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                **arm.options,
            )
        logprobs = continuation_logprobs(self.model, output)
        outcomes = []
        for b, (ids, scores) in enumerate(zip(output.new_ids, logprobs)):
            row = SequenceState(b, [], self.tokenizer)
            for token in ids:
                row.append(token)
            metrics = {**self._rates(ids), "words": float(len(row.text.split())), "logprob": float(scores.mean())}
            hits, tokens = self._counts(ids)
            counts = {"phase_hits": hits.tolist(), "phase_tokens": tokens.tolist()}
            detail = {**counts, **shown_tokens(output, b, row, scores)}
            outcomes.append(Outcome(metrics, generation_cost(output, b, meter), detail))
        return outcomes

    def wave(self, amplitude: float, shift: float = 0.0) -> np.ndarray:
        """Mean of exp(bias) over the positions of each phase bin: what the odds are multiplied by."""
        t = np.arange(math.ceil(2 * self.period))
        factors = np.exp(triangular_wave(t, amplitude, self.period, shift))
        bins = self._bins(len(t))
        return np.bincount(bins, factors, BINS) / np.bincount(bins, minlength=BINS)

    def _bins(self, length: int) -> np.ndarray:
        return (np.arange(length) * BINS / self.period % BINS).astype(int)  # exact at the borders of bins

    def _counts(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Reflection tokens and all tokens in each phase bin."""
        bins = self._bins(len(ids))
        return np.bincount(bins[np.isin(ids, self.token_ids)], minlength=BINS), np.bincount(bins, minlength=BINS)

    def _rates(self, ids: Sequence[int]) -> dict[str, float]:
        hits, tokens = self._counts(ids)
        parts = {"rate_top": list(TOP), "rate_bottom": list(BOTTOM), "reflection_rate": list(range(BINS))}
        # a text that ends before a phase says nothing about it
        return {n: float(hits[p].sum() / tokens[p].sum()) if tokens[p].sum() else math.nan for n, p in parts.items()}
