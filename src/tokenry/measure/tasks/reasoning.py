"""The task `reasoning`: problems of graded difficulty, solved by thinking aloud within one or more budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...data.problems import Problem, VerifiableTask
from ...decode.api import generate
from ...decode.generation.output import DecodeOutput
from ...decode.reasoning.reflection import end_think_ids
from ..cost import Meter
from ..task import Arm, Metric, Outcome, Sample
from .generated import continuation_logprobs, generation_cost

__all__ = ["END_THINK", "ReasoningTask", "Solved"]

END_THINK = "</think>"
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 0}


class Solved(NamedTuple):
    """What became of one solution. `thinking` counts the tokens before the end of thinking, `reflections` those of
    them that reconsider."""

    right: bool
    finished: bool
    tokens: int
    thinking: int
    reflections: int

    def right_within(self, budget: int) -> bool:
        """Whether it would be right, had it been cut off at `budget` tokens."""
        return self.right and self.tokens <= budget


class ReasoningTask:
    """Problems of every level, each solved once per seed at temperature 0.8.

    An arm has a method, or an `apply`: keyword arguments for `tokenry.generate`. A solution that was cut off counts as
    wrong. Smaller budgets need no run of their own: no rule here looks ahead to the budget, so the same solution would
    have been cut off there.

    Args:
        reflection_ids: the tokens that begin a reconsideration.
        budgets: limits below `max_new_tokens` for which accuracy is told as well, as `accuracy_64`.

    Raises:
        InputError: a budget that is not from 1 to `max_new_tokens`, or a model without `</think>`.
    """

    slug: ClassVar[str] = "reasoning"
    stage: ClassVar[str] = "decode"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: VerifiableTask,
        problems: Sequence[Problem],
        reflection_ids: Sequence[int],
        max_new_tokens: int = 256,
        budgets: Sequence[int] = (),
    ) -> None:
        if any(not 1 <= budget <= max_new_tokens for budget in budgets):
            raise InputError(f"budgets={list(budgets)} is not allowed; give numbers from 1 to {max_new_tokens}")
        self.model, self.tokenizer, self.task, self.problems = model, tokenizer, task, problems
        self.reflection_ids, self.end_ids = set(reflection_ids), list(end_think_ids(tokenizer, END_THINK) or ())
        self.max_new_tokens, self.budgets = max_new_tokens, tuple(budgets)
        self.setting = {
            "problems": task.name,
            "reflection_ids": sorted(self.reflection_ids),
            "max_new_tokens": max_new_tokens,
            "budgets": list(budgets),
        }
        self.metrics: Sequence[Metric] = (
            Metric("accuracy", "higher", f"share of problems solved rightly within {max_new_tokens} tokens"),
            *(Metric(f"accuracy_{n}", "higher", f"the same within {n} tokens") for n in self.budgets),
            Metric("finished", "higher", f"share of solutions that ended within {max_new_tokens} tokens"),
            Metric("reflections", None, "reflection tokens per 100 tokens of thinking"),
            Metric("confidence", None, "probability of a token under the plain model, geometric mean over a solution"),
        )

    def samples(self) -> list[Sample]:
        return [
            Sample(problem.id, problem.question, {"index": i, "level": problem.difficulty})
            for i, problem in enumerate(self.problems)
        ]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        problems = [self.problems[sample.data["index"]] for sample in samples]
        with Meter() as meter:
            output = self.generate(problems, 100_000 * seed + samples[0].data["index"], arm.options)
        confidence = [math.exp(scores.mean()) for scores in continuation_logprobs(self.model, output)]
        return [
            self._outcome(problem, solved, output.texts[b], confidence[b], generation_cost(output, b, meter))
            for b, (problem, solved) in enumerate(zip(problems, self.solved(problems, output)))
        ]

    def generate(self, problems: Sequence[Problem], seed: int, apply: Mapping[str, Any] | None = None) -> DecodeOutput:
        """A solution of each problem, with what the arm applies."""
        questions = [problem.question for problem in problems]
        options = {"max_new_tokens": self.max_new_tokens, "seed": seed, **SAMPLING, **(apply or {})}
        return generate(self.model, self.tokenizer, questions, **options)

    def solved(self, problems: Sequence[Problem], output: DecodeOutput) -> list[Solved]:
        """What became of each row of a generation."""
        return [self._solved(*row) for row in zip(problems, output.new_ids, output.texts, strict=True)]

    def _solved(self, problem: Problem, ids: list[int], text: str) -> Solved:
        finished = ids[-1] == self.tokenizer.eos_token_id
        thinking = ids[: ids.index(self.end_ids[0])] if self.end_ids[0] in ids else ids
        reflections = int(np.isin(thinking, list(self.reflection_ids)).sum())
        return Solved(finished and self.task.check(problem, text), finished, len(ids), len(thinking), reflections)

    def _outcome(
        self, problem: Problem, solved: Solved, text: str, confidence: float, cost: dict[str, float]
    ) -> Outcome:
        metrics = {
            "accuracy": float(solved.right),
            **{f"accuracy_{n}": float(solved.right_within(n)) for n in self.budgets},
            "finished": float(solved.finished),
            "reflections": 100 * solved.reflections / solved.thinking if solved.thinking else math.nan,
            "confidence": confidence,
        }
        note = f"level {problem.difficulty}, {'right' if solved.right else 'wrong'}: {text!r}"
        return Outcome(metrics, cost, {"level": problem.difficulty, "note": note})
