"""The task `sums`: a model solves small sums several times over, and judges tell its right solutions from its wrong."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from ...judge.answers.choice import best_of_n, weighted_vote
from ...judge.answers.samples import Judged, Solution
from ...judge.crew import CRew
from ...text.answers import normalise_answer
from ...text.spans import text_offsets
from ..task import Arm, Metric, Outcome, Sample

__all__ = ["KINDS", "ArithmeticTask", "Judge", "auroc"]

Judge = Callable[[Sequence[Solution], random.Random], Iterable[float | None]]

QUESTION = "Q: {a} + {b} = ? A:"
SHOTS = ((17, 25), (8, 14), (23, 19))
KINDS = {  # how the solved examples answer: with the equation alone, or with words in front that anybody may choose
    "equation": ("", "", ""),
    "free words": ("With apples: ", "With old books: ", "With stamps: "),
}
NEW_TOKENS = 20


class ArithmeticTask:
    """Sums a + b of numbers from 2 to 30, each solved `drawn` times at temperature 1 after three solved examples.

    All judges see the same solutions, which are drawn once. An arm's `apply` gives each solution a score > 0, or
    None. The answer is the last number of the solution; what has none counts as wrong and is left out of every choice.

    `seconds` are those of judging: the solutions come with their log-probabilities, so no judge needs a forward.
    """

    slug: ClassVar[str] = "sums"
    stage: ClassVar[str] = "judge"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("best_of_n", "higher", "share of questions whose highest score is a right solution"),
        Metric("vote", "higher", "share of questions where the vote weighted by the score is right"),
        Metric("concordance", "higher", "share of (right, wrong) pairs of a question in the right order, ties half"),
        Metric("accuracy", None, "share of right solutions, the same for every judge"),
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        count: int = 200,
        drawn: int = 8,
        seed: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.drawn = model, tokenizer, drawn
        self.setting = {"drawn": drawn, "seed": seed}
        self.reader = CRew(marker="number")
        self.prefixes: dict[str, tuple[Tensor, DynamicCache]] = {}
        self._last: tuple[tuple, list[list[Solution]]] | None = None
        ids = [*tokenizer.get_vocab().values()]
        lines = {i for i in ids if "\n" in tokenizer.decode([i])}
        self.ends = sorted(lines | {tokenizer.eos_token_id})
        draw = random.Random(seed)
        self._samples = [self._sample(i, draw.randint(2, 30), draw.randint(2, 30), seed) for i in range(count)]

    @staticmethod
    def _sample(index: int, a: int, b: int, seed: int) -> Sample:
        kind = list(KINDS)[index % len(KINDS)]
        data = {"answer": str(a + b), "kind": kind, "index": index}
        return Sample(f"sums-{seed}-{index:03}", QUESTION.format(a=a, b=b), data)

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        return [
            self._judge(arm.apply, sample, solutions, seed)
            for sample, solutions in zip(samples, self._solutions(samples, seed))
        ]

    def _judge(self, judge: Judge, sample: Sample, solutions: Sequence[Solution], seed: int) -> Outcome:
        start = time.perf_counter()
        scores = judge(solutions, random.Random(f"{seed} {sample.id}"))
        seconds = time.perf_counter() - start
        gold = sample.data["answer"]
        read = self.reader.judge(solutions, [gold] * len(solutions))
        judged = [one._replace(score=None if one.answer is None else s) for one, s in zip(read, scores, strict=True)]
        known = [one for one in judged if one.score is not None]
        best, vote = best_of_n(judged), weighted_vote(judged)
        metrics = {
            "best_of_n": float(best is not None and best.correct),
            "vote": float(vote is not None and vote.answer == normalise_answer(gold)),
            "concordance": auroc([one.score for one in known], [one.correct for one in known]),
            "accuracy": float(np.mean([one.correct for one in judged])),
        }
        pairs = [[round(one.score, 6), int(one.correct)] for one in known]
        shown = _shown(judged, solutions, best)
        return Outcome(
            metrics,
            {"seconds": seconds, "forward_passes": 0, "tokens_processed": 0},
            {"kind": sample.data["kind"], "scored": pairs, **shown},
        )

    # --- drawing ---------------------------------------------------------------------------------------------------

    def _solutions(self, samples: Sequence[Sample], seed: int) -> list[list[Solution]]:
        """The solutions of each sample. All arms of a batch share them."""
        key = (seed, *(sample.id for sample in samples))
        if self._last is None or self._last[0] != key:
            drawn: dict[str, list[Solution]] = {}
            for kind in KINDS:
                mine = [sample for sample in samples if sample.data["kind"] == kind]
                drawn |= self._draw(kind, mine, 1_000_003 * seed + samples[0].data["index"]) if mine else {}
            self._last = key, [drawn[sample.id] for sample in samples]
        return self._last[1]

    @torch.no_grad()
    def _draw(self, kind: str, samples: Sequence[Sample], seed: int) -> dict[str, list[Solution]]:
        """Sample every question `drawn` times. The solved examples are read once; padding comes after them."""
        shots, cache = self._prefix(kind)
        rows = [sample for sample in samples for _ in range(self.drawn)]
        asked = self.tokenizer(
            [sample.prompt for sample in rows],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        ).to(self.model.device)
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(rows))
        ids = torch.cat([shots.expand(len(rows), -1), asked.input_ids], 1)
        mask = torch.cat([torch.ones_like(shots).expand(len(rows), -1), asked.attention_mask], 1)
        watch = DrawnLogprobs()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            out = self.model.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                logits_processor=LogitsProcessorList([watch]),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=self.ends,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        logprobs = watch.finish(out).cpu()
        found: dict[str, list[Solution]] = {}
        for sample, new, logprob in zip(rows, out[:, ids.shape[1] :].tolist(), logprobs):
            found.setdefault(sample.id, []).append(self._solution(sample.prompt, new, logprob))
        return found

    def _prefix(self, kind: str) -> tuple[Tensor, DynamicCache]:
        """The solved examples of a kind (1, T) and their cache."""
        if kind not in self.prefixes:
            solved = [
                f"{QUESTION.format(a=a, b=b)} {words}{a} + {b} = {a + b}.\n"
                for (a, b), words in zip(SHOTS, KINDS[kind])
            ]
            ids = self.tokenizer("".join(solved), return_tensors="pt").input_ids.to(self.model.device)
            cache = DynamicCache(config=self.model.config)
            self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            self.prefixes[kind] = ids, cache
        return self.prefixes[kind]

    def _solution(self, prompt: str, new: list[int], logprob: Tensor) -> Solution:
        """The tokens before the end of the line."""
        length = next((i for i, token in enumerate(new) if token in self.ends), len(new))
        text, offsets = text_offsets(self.tokenizer, new[:length])
        return Solution(prompt, text, offsets, logprob[:length], finished=length < len(new))


class DrawnLogprobs(LogitsProcessor):
    """Keeps the log-probability of every drawn token, from the logits before any warping."""

    def __init__(self) -> None:
        self.before: Tensor | None = None
        self.parts: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._take(input_ids)
        self.before = scores.float().log_softmax(-1)
        return scores

    def finish(self, sequences: Tensor) -> Tensor:
        """(rows, new tokens) in nats, once generation has returned `sequences`."""
        self._take(sequences)
        return torch.cat(self.parts, 1)

    def _take(self, ids: Tensor) -> None:
        if self.before is not None:
            self.parts.append(self.before.gather(1, ids[:, -1:]))


def auroc(scores: Sequence[float], correct: Sequence[bool]) -> float:
    """Probability that a right one scores above a wrong one, equal scores counted half; NaN without both."""
    scores, right = np.asarray(scores, float), np.asarray(correct, bool)
    if right.all() or not right.any():
        return float("nan")
    wrong = np.sort(scores[~right])
    below = np.searchsorted(wrong, scores[right], "left") + np.searchsorted(wrong, scores[right], "right")
    return float(below.mean() / 2 / len(wrong))


def _shown(judged: Sequence[Judged], solutions: Sequence[Solution], best: Judged | None) -> dict[str, Any]:
    """For the report: the chosen solution token by token, and what all answered."""
    answers = ", ".join(one.answer or "none" for one in judged)
    if best is None:
        return {"tokens": [], "note": f"no answer among {answers}"}
    chosen = solutions[judged.index(best)]
    pieces = [chosen.text[a:b] for a, b in chosen.offsets.tolist()]
    tokens = [[piece, round(p, 4)] for piece, p in zip(pieces, chosen.logprob.exp().tolist())]
    return {"tokens": tokens, "note": f"chosen: {best.answer} ({'right' if best.correct else 'wrong'}) of {answers}"}
