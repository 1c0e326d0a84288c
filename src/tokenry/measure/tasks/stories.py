"""The task `stories`: short stories, how many banned patterns they contain, and how natural they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise
from typing import ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...decode.api import generate
from ...decode.bans.phrases import PhraseBan
from ...decode.generation.output import DecodeOutput
from ...decode.generation.sequence import SequenceState
from ..cost import Meter
from ..task import Arm, Metric, Outcome, Sample
from .generated import continuation_logprobs, generation_cost, shown_tokens

SAMPLING = {"do_sample": True, "temperature": 1.0, "min_p": 0.05, "top_k": 0}

__all__ = ["StoriesTask", "story_prompts"]


def story_prompts() -> list[str]:
    """64 one-sentence writing prompts."""
    return (files("tokenry.data") / "prompts" / "story_prompts.txt").read_text(encoding="utf-8").splitlines()


class StoriesTask:
    """Stories sampled at temperature 1 with min-p 0.05.

    An arm has a method, or an `apply`: keyword arguments for `tokenry.generate` (methods, or `bad_words_ids`).
    Perplexity is that of the text under the plain model at temperature 1, without truncation.
    """

    slug: ClassVar[str] = "stories"
    stage: ClassVar[str] = "decode"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("hits_per_1000_words", "lower", "banned patterns in 1,000 words"),
        Metric("perplexity", "lower", "of the text under the plain model"),
        Metric("distinct_2", "higher", "different word pairs / word pairs, within a story"),
        Metric("words", None, "words in a story"),
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        patterns: Sequence[str],
        count: int = 64,
        max_new_tokens: int = 110,
        first: int = 0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.detector = PhraseBan(patterns)
        self.prompts = dict(list(enumerate(story_prompts()))[first : first + count])
        self.max_new_tokens = max_new_tokens
        self.setting = {"patterns": list(patterns), "max_new_tokens": max_new_tokens}

    def samples(self) -> list[Sample]:
        return [Sample(f"story-{i:02d}", prompt) for i, prompt in self.prompts.items()]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        return self.score(*self.write(arm, samples, seed))

    def write(self, arm: Arm, samples: Sequence[Sample], seed: int) -> tuple[DecodeOutput, Meter]:
        """The stories, and what they cost."""
        first = int(samples[0].id.removeprefix("story-"))
        with Meter() as meter:
            output = generate(
                self.model,
                self.tokenizer,
                [s.prompt for s in samples],
                max_new_tokens=self.max_new_tokens,
                seed=1000 * seed + first,
                **SAMPLING,
                **arm.options,
            )
        return output, meter

    def score(self, output: DecodeOutput, meter: Meter) -> list[Outcome]:
        """Hits, and naturalness under the model as it is now."""
        logprobs = continuation_logprobs(self.model, output)
        outcomes = []
        for b, (ids, scores) in enumerate(zip(output.new_ids, logprobs)):
            row = SequenceState(0, [], self.tokenizer)
            hits = self._hits(row, ids)
            words = output.texts[b].lower().split()
            pairs = list(pairwise(words))
            outcomes.append(
                Outcome(
                    {
                        "hits_per_1000_words": 1000 * len(hits) / max(len(words), 1),
                        "perplexity": math.exp(-float(scores.mean())),
                        "distinct_2": len(set(pairs)) / max(len(pairs), 1),
                        "words": float(len(words)),
                    },
                    generation_cost(output, b, meter),
                    {"nll": -float(scores.sum()), "hits": hits, **shown_tokens(output, b, row, scores)},
                )
            )
        return outcomes

    def _hits(self, row: SequenceState, ids: list[int]) -> list[tuple[int, int]]:
        """Character spans of the banned patterns, found token by token as the monitor would."""
        spans = []
        for token in ids:
            row.append(token)
            violation = self.detector.check(row)
            if violation is not None:
                spans.append(violation.span)
            row.checked = len(row.text)
        return spans
