"""Needle task: does a shortened cache still hold a fact from the middle of the prompt?"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ...hooks.attention import AttentionCall, observe
from ...models.kv_cache import cache_bytes
from ...select.cutters.cache import CacheCutter
from ...select.heads.calibrate import make_needle_prompts
from ..task import Arm, Metric, Outcome, Sample

__all__ = ["NeedleTask", "Opens"]

Opens = Callable[[PreTrainedModel, int], CacheCutter]


class NeedleTask:
    """Five digits hidden in filler text, written back from the compressed cache with teacher forcing.

    An arm's `apply` is None (full cache) or `apply(model, draw)`, which opens a cache cutter; `draw` numbers the
    sample and seed, for controls that are random. One forward reads the prompt, once for all arms, one the answer.
    The first answer token is left out of the metrics: prefill predicts it, with the full cache, for every arm.

    `seconds` are those of cutting and of reading the answer; `cache_bytes` is the cache right after the prompt.
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
        self._last: tuple[str, tuple] | None = None
        prompts = make_needle_prompts(tokenizer, count, length, seed)
        self._samples = [
            Sample(f"needle-{seed}-{i:03}", p.prompt, {"answer": p.answer, "index": i}) for i, p in enumerate(prompts)
        ]

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        return [self._run(arm.apply, sample, seed) for sample in samples]

    @torch.no_grad()
    def _run(self, opens: Opens | None, sample: Sample, seed: int) -> Outcome:
        answer = self._ids(sample.data["answer"])
        full, calls, length = self._prefill(sample)
        cache = copy.deepcopy(full)
        context = nullcontext() if opens is None else opens(self.model, seed * 10_007 + sample.data["index"])
        with context as cutter:
            start = time.perf_counter()
            if cutter is not None:
                cutter.cut(cache, calls)
            held = cache_bytes(cache)
            logits = self.model(answer[:, :-1], past_key_values=cache, use_cache=True).logits[0].float()
            seconds = time.perf_counter() - start
        targets = answer[0, 1:]
        log_probs = logits.log_softmax(-1)
        chosen = log_probs.gather(1, targets[:, None])[:, 0]
        kept = None if cutter is None or cutter.trace is None else list(cutter.trace.counts().values())
        note = f"best guess: {self.tokenizer.decode(logits.argmax(-1))!r}"
        return Outcome(
            metrics={
                "answer_nll": -float(chosen.mean()),
                "token_accuracy": float((logits.argmax(-1) == targets).float().mean()),
            },
            cost={
                "seconds": seconds,
                "forward_passes": 2,
                "tokens_processed": length + answer.shape[1] - 1,
                "cache_bytes": held,
            },
            detail={
                "prompt_tokens": length,
                "kept": kept,
                "tokens": self._tokens(targets, chosen),
                "note": note,
            },
        )

    def _prefill(self, sample: Sample) -> tuple[DynamicCache, dict[int, AttentionCall], int]:
        """The full cache of the prompt and its attention calls. All arms of a sample share one prefill."""
        if self._last is None or self._last[0] != sample.id:
            prompt, cache = self._ids(sample.prompt), DynamicCache(config=self.model.config)
            calls: dict[int, AttentionCall] = {}
            with observe(self.model, lambda call: calls.update({call.layer: call})):
                self.model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
            self._last = sample.id, (cache, calls, prompt.shape[1])
        return self._last[1]

    def _ids(self, text: str) -> Tensor:
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return ids.to(self.model.device)

    def _tokens(self, targets: Tensor, chosen: Tensor) -> list[list[Any]]:
        """Each scored answer token and its probability."""
        return [[self.tokenizer.decode([t]), round(p, 4)] for t, p in zip(targets.tolist(), chosen.exp().tolist())]
