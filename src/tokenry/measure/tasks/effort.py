"""The task `effort`: a model answers each problem at several levels of effort, and rules say how many times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.problems import Problem, VerifiableTask
from ...decode.api import generate
from ...decode.budget_forcing import BudgetForcing
from ...judge.arise import arise_score, permuted_scores
from ...judge.scaling.sampling import AdaptiveSampler
from ..task import Arm, Metric, Outcome, Sample

__all__ = ["EffortTask"]

SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": 256}
CLOSE = "\n</think>\n"  # how thinking is closed in the model's own solutions
Runs = list[list[tuple[float, float]]]  # of each level: accuracy and tokens of its runs


class EffortTask:
    """Problems solved `most` times at each limit on thinking tokens. An arm's `apply` is an `AdaptiveSampler`; all read
    the same runs in the same order, as many as they ask for, so that only the rule differs.

    Args:
        budgets: thinking tokens at which thinking is closed, from the least to the most.
    """

    slug: ClassVar[str] = "effort"
    stage: ClassVar[str] = "judge"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("arise", None, "ARISE of the question"),
        Metric("over_null", None, "ARISE minus its mean over permuted levels"),
        Metric("runs", "lower", "runs of the question, all levels together"),
        Metric("first", None, "accuracy at the least effort"),
        Metric("last", None, "accuracy at the most effort"),
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: VerifiableTask,
        problems: Sequence[Problem],
        budgets: Sequence[int],
        most: int = 10,
    ) -> None:
        self.model, self.tokenizer, self.task, self.problems = model, tokenizer, task, problems
        self.budgets, self.most = tuple(budgets), most
        self.setting = {"budgets": list(budgets), "most": most, **SAMPLING}
        self._last: tuple[tuple, list[Runs]] | None = None

    def samples(self) -> list[Sample]:
        return [Sample(p.id, p.question, {"index": i, "level": p.difficulty}) for i, p in enumerate(self.problems)]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        return [self._outcome(arm.apply, runs, seed) for runs in self._runs(samples, seed)]

    def _outcome(self, sampler: AdaptiveSampler, runs: Runs, seed: int) -> Outcome:
        cells = [sampler.run(iter(level).__next__) for level in runs]
        a, t = np.array([[cell.accuracy for cell in cells]]), np.array([[cell.tokens for cell in cells]])
        score = arise_score(a, t).score
        metrics = {
            "arise": score,
            "over_null": score - float(permuted_scores(a, t, 200, seed).mean()),
            "runs": float(sum(len(cell.runs) for cell in cells)),
            "first": float(a[0, 0]),
            "last": float(a[0, -1]),
        }
        tokens = float(sum(count for cell in cells for _, count in cell.runs))
        return Outcome(metrics, {"tokens": tokens}, {"accuracies": a[0].tolist(), "token_means": t[0].tolist()})

    def _runs(self, samples: Sequence[Sample], seed: int) -> list[Runs]:
        """The runs of each sample; all arms of a batch share them."""
        key = (seed, *(sample.id for sample in samples))
        if self._last is None or self._last[0] != key:
            levels = [list(self._at(budget, samples, seed)) for budget in self.budgets]
            self._last = key, [[level[i] for level in levels] for i in range(len(samples))]
        return self._last[1]

    def _at(self, budget: int, samples: Sequence[Sample], seed: int) -> Iterator[list[tuple[float, float]]]:
        """The runs of each sample at one budget."""
        problems = [self.problems[sample.data["index"]] for sample in samples for _ in range(self.most)]
        limit = BudgetForcing(min_ignores=0, max_thinking_tokens=budget, close_text=CLOSE)
        options: dict[str, Any] = {"methods": [limit], **SAMPLING}
        drawn = 1_000_003 * seed + 1009 * budget + samples[0].data["index"]
        output = generate(self.model, self.tokenizer, [p.question for p in problems], seed=drawn, **options)
        rows = zip(problems, output.texts, output.new_ids, strict=True)
        runs = [(float(self._right(*row)), float(len(row[2]))) for row in rows]
        for first in range(0, len(runs), self.most):
            yield runs[first : first + self.most]

    def _right(self, problem: Problem, text: str, ids: Sequence[int]) -> bool:
        """A solution that was cut off is wrong."""
        return ids[-1] == self.tokenizer.eos_token_id and self.task.check(problem, text)
