"""The task `steps`: sums solved line by line, where every line can be checked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import ClassVar

from ...data.problems import Arithmetic, Problem, apply_sign
from ...decode.reasoning.speculative import ReasoningResult, StepRecord
from ..task import Arm, Metric, Outcome, Sample

__all__ = ["StepsTask", "candidates", "lines_stand", "right_step"]

Reasoning = Callable[[Sequence[Problem], int], list[ReasoningResult]]


class StepsTask:
    """Problems, and what two models spend on them. An arm's `apply` solves a batch: (problems, seed) -> results.

    A text that did not end by itself counts as wrong.
    """

    slug: ClassVar[str] = "steps"
    stage: ClassVar[str] = "decode"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("accuracy", "higher", "share of problems answered rightly"),
        Metric("base_tokens", "lower", "tokens the base model has written, thrown away or not"),
        Metric("small_tokens", None, "tokens the small model has written, thrown away or not"),
        Metric("judged", None, "steps judged; each is one forward pass of the base model where that judges"),
        Metric("acceptance", None, "share of judged steps that were kept"),
        Metric("right_drafts", None, "share of judged steps that were right"),
    )

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = problems

    def samples(self) -> list[Sample]:
        return [Sample(problem.id, problem.question, {"index": i}) for i, problem in enumerate(self.problems)]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        problems = [self.problems[sample.data["index"]] for sample in samples]
        found = arm.apply(problems, 100_000 * seed + samples[0].data["index"])
        return [outcome(problem, result) for problem, result in zip(problems, found, strict=True)]


def outcome(problem: Problem, result: ReasoningResult) -> Outcome:
    """One solved problem. The detail `scored` has the score of every judged step and whether the step was right."""
    scored = [
        [step.score.value, int(right_step(problem.question, before, text))]
        for step, before, text in candidates(result)
        if step.score is not None
    ]
    right = result.stop_reason == "finished" and Arithmetic().check(problem, result.text)
    stats = result.stats
    metrics = {
        "accuracy": float(right),
        "base_tokens": float(stats.base_tokens),
        "small_tokens": float(stats.small_tokens),
        "judged": float(stats.judged),
        "acceptance": stats.acceptance,
        "right_drafts": sum(one for _, one in scored) / len(scored) if scored else math.nan,
    }
    lines = "; ".join(f"{step.text} ({step.source})" for step in result.steps)
    note = f"level {problem.difficulty}: {'right' if right else 'wrong'}, {result.stop_reason}; {lines}"
    return Outcome(metrics, {"tokens": float(stats.kept_tokens)}, {"scored": scored, "note": note})


def candidates(result: ReasoningResult) -> list[tuple[StepRecord, list[str], str]]:
    """Every step with the lines before it and what was proposed."""
    lines = [step.text for step in result.steps]
    return [
        (step, lines[:i], step.text if step.rejected_text is None else step.rejected_text)
        for i, step in enumerate(result.steps)
    ]


def right_step(question: str, lines: Sequence[str], candidate: str) -> bool:
    """Whether a line may come next: the next operation on the values written so far, worked out rightly; `wait` behind
    an operation; `check` or the end of thinking when all is done."""
    left = _next_operation(question, lines)
    if candidate == "wait":
        return bool(lines) and "=" in lines[-1]
    if candidate in ("check", "</think>"):
        return left is None
    return left is not None and candidate == "{}{}{}={}".format(*left, apply_sign(*left))


def lines_stand(question: str, lines: Sequence[str]) -> bool:
    """Whether the lines of a solution are right, but for those that `wait` takes back, or `check` all of them."""
    standing: list[bool] = []
    for i, line in enumerate(lines):
        right = right_step(question, lines[:i], line)
        if right and line == "wait":
            standing.pop()
        elif right and line == "check":
            standing = []
        else:
            standing.append(right)
    return all(standing)


class _Unsolved(Exception):
    """The operation for which no line is there yet."""


def _next_operation(question: str, lines: Sequence[str]) -> tuple[int, str, int] | None:
    """The operation that is due after these lines, right or wrong; None if all are done."""
    values: list[int] = []
    for line in lines:
        written = re.fullmatch(r"\d+[-+*]\d+=(\d+)", line)
        if written:
            values.append(int(written[1]))
        elif line == "wait":
            del values[-1:]
        elif line == "check":
            values = []
    given = iter(values)

    def solve(left: int, sign: str, right: int) -> int:
        value = next(given, None)
        if value is None:
            raise _Unsolved(left, sign, right)
        return value

    try:
        Arithmetic().evaluate(question, solve)
    except _Unsolved as due:
        return due.args
    return None
