"""Needle task: does a shortened cache still hold a fact from the middle of the prompt?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..cache import cache_bytes
from ..select.calibrate import make_needle_prompts
from ..select.core import CacheCutter
from .task import Metric, Outcome, Sample, Subject

__all__ = ["NeedleTask", "Opens"]

Opens = Callable[[PreTrainedModel, int], CacheCutter]


class NeedleTask:
    """Five digits hidden in filler text, written back from the compressed cache with teacher forcing.

    A subject's `apply` is None (full cache) or `apply(model, draw)`, which opens a cache cutter; `draw` numbers the
    sample and seed, for controls that are random. One forward reads the prompt, one the answer. The first answer
    token is left out of the metrics: prefill predicts it, with the full cache, for every subject.

    `cache_bytes` is the cache right after the prompt.
    """

    slug: ClassVar[str] = "needle"
    stage: ClassVar[str] = "select"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("answer_nll", "lower", "mean negative log-likelihood of the answer tokens, in nats"),
        Metric("token_accuracy", "higher", "share of answer tokens that are the most likely ones"),
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        count: int = 60,
        length: int = 500,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        prompts = make_needle_prompts(tokenizer, count, length, seed)
        self._samples = [
            Sample(f"needle-{seed}-{i:03}", p.prompt, {"answer": p.answer, "index": i}) for i, p in enumerate(prompts)
        ]

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def run(self, subject: Subject, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        return [self._run(subject.apply, sample, seed) for sample in samples]

    @torch.no_grad()
    def _run(self, opens: Opens | None, sample: Sample, seed: int) -> Outcome:
        prompt, answer = self._ids(sample.prompt), self._ids(sample.data["answer"])
        cache = DynamicCache(config=self.model.config)
        context = nullcontext() if opens is None else opens(self.model, seed * 10_007 + sample.data["index"])
        start = time.perf_counter()
        with context as cutter:
            self.model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
            held = cache_bytes(cache)
            logits = self.model(answer[:, :-1], past_key_values=cache, use_cache=True).logits[0].float()
        seconds = time.perf_counter() - start
        targets = answer[0, 1:]
        log_probs = logits.log_softmax(-1)
        chosen = log_probs.gather(1, targets[:, None])[:, 0]
        kept = None if cutter is None else list(cutter.trace.counts().values())
        note = f"best guess: {self.tokenizer.decode(logits.argmax(-1))!r}"
        return Outcome(
            metrics={
                "answer_nll": -float(chosen.mean()),
                "token_accuracy": float((logits.argmax(-1) == targets).float().mean()),
            },
            cost={
                "seconds": seconds,
                "forward_passes": 2,
                "token_forwards": prompt.shape[1] + answer.shape[1] - 1,
                "cache_bytes": held,
            },
            detail={
                "prompt_tokens": prompt.shape[1],
                "kept": kept,
                "tokens": self._tokens(targets, chosen),
                "note": note,
            },
        )

    def _ids(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return ids.to(self.model.device)

    def _tokens(self, targets: Tensor, chosen: Tensor) -> list[list[Any]]:
        """Each scored answer token and its probability."""
        return [[self.tokenizer.decode([t]), round(p, 4)] for t, p in zip(targets.tolist(), chosen.exp().tolist())]
