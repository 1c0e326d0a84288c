"""The task `difficulty`: problems of graded difficulty, and how an arm spends its tokens on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

from transformers import PreTrainedTokenizerBase

from ...data.problems import Problem, VerifiableTask
from ...decode.generation.output import DecodeOutput
from ..cost import Meter
from ..task import Arm, Metric, Outcome, Sample
from .generated import generation_cost

__all__ = ["Answer", "DifficultyTask", "answers"]


class Answer(NamedTuple):
    """What an arm wrote on one problem, by which strategy, and what that cost (keys of COSTS)."""

    text: str
    finished: bool
    strategy: str
    cost: dict[str, float]


Answering = Callable[[Sequence[Problem], int], list[Answer]]


def answers(
    output: DecodeOutput, meter: Meter, strategies: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Answer]:
    """The rows of a generation as answers; those that end with the end-of-text token are finished."""
    return [
        Answer(text, ids[-1] == tokenizer.eos_token_id, name, generation_cost(output, b, meter))
        for b, (text, ids, name) in enumerate(zip(output.texts, output.new_ids, strategies))
    ]


class DifficultyTask:
    """Problems of every level. An arm's `apply` answers a batch of them: (problems, seed) -> answers.

    An answer that was cut off at its budget counts as wrong.
    """

    slug: ClassVar[str] = "difficulty"
    stage: ClassVar[str] = "decode"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("accuracy", "higher", "share of problems answered rightly"),
        Metric("finished", "higher", "share of answers that ended before their budget"),
    )

    def __init__(self, task: VerifiableTask, problems: Sequence[Problem]) -> None:
        self.task, self.problems = task, problems
        self.setting = {"problems": task.name}

    def samples(self) -> list[Sample]:
        return [Sample(problem.id, problem.question, {"index": i}) for i, problem in enumerate(self.problems)]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        problems = [self.problems[sample.data["index"]] for sample in samples]
        found = arm.apply(problems, 100_000 * seed + samples[0].data["index"])
        return [self._outcome(problem, answer) for problem, answer in zip(problems, found, strict=True)]

    def right(self, problem: Problem, answer: Answer) -> bool:
        """Whether the answer is finished and right."""
        return answer.finished and self.task.check(problem, answer.text)

    def _outcome(self, problem: Problem, answer: Answer) -> Outcome:
        right = self.right(problem, answer)
        note = f"level {problem.difficulty}, {answer.strategy}: {'right' if right else 'wrong'}; {answer.text!r}"
        return Outcome(
            {"accuracy": float(right), "finished": float(answer.finished)},
            answer.cost,
            {"level": problem.difficulty, "strategy": answer.strategy, "note": note},
        )
