"""The task `stories`: short stories, how many banned patterns they contain, and how natural they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..cache import cache_bytes
from ..decode.antislop import PhraseBan
from ..decode.api import generate
from ..decode.core import DecodeOutput, Row
from .cost import Meter
from .task import Metric, Outcome, Sample, Subject

SAMPLING = {"do_sample": True, "temperature": 1.0, "min_p": 0.05, "top_k": 0}

__all__ = ["StoriesTask", "story_prompts"]


def story_prompts() -> list[str]:
    """64 one-sentence writing prompts."""
    return (files("tokenry.measure") / "data" / "story_prompts.txt").read_text(encoding="utf-8").splitlines()


class StoriesTask:
    """Stories sampled at temperature 1 with min-p 0.05.

    A subject's `apply` is a dict of keyword arguments for `tokenry.generate` (methods, or `bad_words_ids`).
    Perplexity is that of the text under the plain model at temperature 1, without truncation.
    """

    slug = "stories"
    stage = "decode"
    metrics = (
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
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.detector = PhraseBan(patterns)
        self.prompts = story_prompts()[:count]
        self.max_new_tokens = max_new_tokens

    def samples(self) -> list[Sample]:
        return [Sample(f"story-{i:02d}", prompt) for i, prompt in enumerate(self.prompts)]

    def run(self, subject: Subject, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        first = int(samples[0].id.removeprefix("story-"))
        with Meter() as meter:
            output = generate(
                self.model,
                self.tokenizer,
                [s.prompt for s in samples],
                max_new_tokens=self.max_new_tokens,
                seed=1000 * seed + first,
                **SAMPLING,
                **(subject.apply or {}),
            )
        return self._outcomes(output, len(samples), meter)

    def _outcomes(self, output: DecodeOutput, count: int, meter: Meter) -> list[Outcome]:
        logprobs = continuation_logprobs(self.model, output)
        outcomes = []
        for b, (ids, scores) in enumerate(zip(output.new_ids, logprobs)):
            row = Row(0, [], self.tokenizer)
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
                    {
                        "seconds": meter.seconds / count,
                        "tokens": float(len(ids)),
                        "forward_passes": output.forward_calls / count,
                        "token_forwards": output.token_forwards / count,
                        "peak_bytes": meter.peak_bytes,
                        "cache_bytes": cache_bytes(output.past_key_values) / count,
                    },
                    self._detail(output, b, row, scores, hits),
                )
            )
        return outcomes

    def _hits(self, row: Row, ids: list[int]) -> list[tuple[int, int]]:
        """Character spans of the banned patterns, found token by token as the monitor would."""
        spans = []
        for token in ids:
            row.append(token)
            violation = self.detector.check(row)
            if violation is not None:
                spans.append(violation.span)
            row.checked = len(row.text)
        return spans

    def _detail(
        self, output: DecodeOutput, b: int, row: Row, scores: Tensor, hits: list[tuple[int, int]]
    ) -> dict[str, Any]:
        starts = [*row.starts, len(row.text)]
        tokens = [row.text[a:z] for a, z in pairwise(starts)]
        marks = [
            {"index": e.index, "kind": e.kind, "rule": e.rule, "rejected": e.rejected_text}
            for e in output.events
            if e.row == b
        ]
        return {
            "tokens": [[t, round(math.exp(s), 4)] for t, s in zip(tokens, scores.tolist())],
            "nll": -float(scores.sum()),
            "hits": [list(span) for span in hits],
            "marks": marks,
        }


def continuation_logprobs(model: PreTrainedModel, output: DecodeOutput) -> list[Tensor]:
    """Log-probability of every generated token under the plain model, one (new tokens,) tensor per row."""
    found = []
    for prompt, ids in zip(output.prompt_ids, output.new_ids):
        whole = torch.tensor([prompt + ids], device=model.device)
        with torch.no_grad():
            logits = model(whole[:, :-1], use_cache=False, logits_to_keep=len(ids)).logits[0].float()
        target = whole[0, -len(ids) :, None]
        found.append(logits.log_softmax(-1).gather(1, target).squeeze(1).cpu())
    return found
