"""The task `sums`: a model solves problems several times over, and judges tell its right solutions from its wrong."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.calibration import auroc
from ...data.problems import Problem
from ...decode.api import generate
from ...judge.answers.choice import best_of_n, weighted_vote
from ...judge.answers.samples import Judged, Solution
from ...judge.crew import CRew
from ...text.answers import normalise_answer
from ...text.spans import text_offsets
from ..task import Arm, Metric, Outcome, Sample
from .generated import continuation_logprobs

__all__ = ["ArithmeticTask", "Judge"]

Judge = Callable[[Sequence[Solution], random.Random], Iterable[float | None]]

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 256}


class ArithmeticTask:
    """Problems that are each solved `drawn` times at temperature 1, step by step where the model has learned that.

    All judges see the same solutions, which are drawn once. An arm's `apply` gives each solution a score > 0, or
    None. The answer is the last number of the solution; what has none, or was cut off, counts as wrong and is left out
    of every choice.

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
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], drawn: int = 8
    ) -> None:
        self.model, self.tokenizer, self.problems, self.drawn = model, tokenizer, problems, drawn
        self.setting = {"drawn": drawn}
        self.reader = CRew(marker="number")
        self._last: tuple[tuple, list[list[Solution]]] | None = None

    def samples(self) -> list[Sample]:
        return [
            Sample(p.id, p.question, {"answer": p.answer, "index": i, "level": p.difficulty})
            for i, p in enumerate(self.problems)
        ]

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
        scored = [(one.score, bool(one.correct)) for one in judged if one.score is not None]
        best, vote = best_of_n(judged), weighted_vote(judged)
        metrics = {
            "best_of_n": float(best is not None and bool(best.correct)),
            "vote": float(vote is not None and vote.answer == normalise_answer(gold)),
            "concordance": auroc([score for score, _ in scored], [correct for _, correct in scored]),
            "accuracy": float(np.mean([bool(one.correct) for one in judged])),
        }
        pairs = [[round(score, 6), int(correct)] for score, correct in scored]
        shown = _shown(judged, solutions, best)
        return Outcome(
            metrics,
            {"seconds": seconds, "forward_passes": 0, "tokens_processed": 0},
            {"level": sample.data["level"], "scored": pairs, **shown},
        )

    def _solutions(self, samples: Sequence[Sample], seed: int) -> list[list[Solution]]:
        """The solutions of each sample. All arms of a batch share them."""
        key = (seed, *(sample.id for sample in samples))
        if self._last is None or self._last[0] != key:
            asked = [sample.prompt for sample in samples for _ in range(self.drawn)]
            output = generate(
                self.model, self.tokenizer, asked, seed=1_000_003 * seed + samples[0].data["index"], **SAMPLING
            )
            rows = zip(asked, output.new_ids, continuation_logprobs(self.model, output))
            drawn = [self._solution(*row) for row in rows]
            self._last = key, [drawn[i : i + self.drawn] for i in range(0, len(drawn), self.drawn)]
        return self._last[1]

    def _solution(self, prompt: str, ids: list[int], logprob: Tensor) -> Solution:
        """The tokens before the end of the text."""
        finished = ids[-1] == self.tokenizer.eos_token_id
        text, offsets = text_offsets(self.tokenizer, ids[:-1] if finished else ids)
        return Solution(prompt, text, offsets, logprob[: len(offsets)], finished)


def _shown(judged: Sequence[Judged], solutions: Sequence[Solution], best: Judged | None) -> dict[str, Any]:
    """For the report: the chosen solution token by token, and what all answered."""
    answers = ", ".join(one.answer or "none" for one in judged)
    if best is None:
        return {"tokens": [], "note": f"no answer among {answers}"}
    chosen = solutions[judged.index(best)]
    pieces = [chosen.text[a:b] for a, b in chosen.offsets.tolist()]
    tokens = [[piece, round(p, 4)] for piece, p in zip(pieces, chosen.logprob.exp().tolist())]
    return {"tokens": tokens, "note": f"chosen: {best.answer} ({'right' if best.correct else 'wrong'}) of {answers}"}
