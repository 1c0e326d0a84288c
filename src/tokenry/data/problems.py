"""Problems with answers that can be checked: a generator with graded difficulty, splits by problem, buckets.

What trains on problems draws from the split "train", what is chosen with their help from "dev", and what is reported
from "test". The split is a hash of the question, so that no problem is ever in two of them, whatever the seed.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

from ..core.errors import InputError
from ..core.fields import Count, check

__all__ = [
    "Arithmetic",
    "Problem",
    "Split",
    "VerifiableTask",
    "apply_sign",
    "by_difficulty",
    "draw_problems",
    "split_of",
]

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
TRIES = 1000  # draws in a row without a new problem after which a level counts as exhausted


@dataclass(frozen=True)
class Problem:
    """A question, its right answer and its level of difficulty (1 is the easiest)."""

    id: str
    question: str
    answer: str
    difficulty: int


class VerifiableTask(Protocol):
    """A kind of problem: draws one of a level, and tells a right answer from a wrong one."""

    @property
    def name(self) -> str: ...

    @property
    def levels(self) -> Sequence[int]: ...

    def draw(self, level: int, rng: random.Random) -> Problem: ...

    def check(self, problem: Problem, text: str) -> bool: ...


def split_of(question: str) -> Split:
    """Eight of ten questions are for training, one for choices, one for reports."""
    digit = hashlib.sha256(question.encode()).digest()[0] % 10
    return "dev" if digit == 8 else "test" if digit == 9 else "train"


def draw_problems(
    task: VerifiableTask,
    count: int,
    seed: int = 0,
    split: Split = "test",
    levels: Sequence[int] | None = None,
) -> list[Problem]:
    """Different problems of one split, the levels by turns; a longer list begins with the shorter one.

    Raises:
        InputError: unknown split or level, count < 1, or a level without enough different problems.
    """
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}; use one of {', '.join(SPLITS)}")
    if count < 1:
        raise InputError(f"count={count} is not allowed; give a number of problems >= 1")
    check("count", count, Count)
    levels = task.levels if levels is None else levels
    unknown = [level for level in levels if level not in task.levels]
    if unknown or not levels:
        raise InputError(f"{task.name} has no level {unknown}; its levels are {list(task.levels)}")
    draws = {level: random.Random(f"{task.name} {split} {seed} {level}") for level in levels}
    seen: set[str] = set()
    return [_fresh(task, levels[i % len(levels)], draws[levels[i % len(levels)]], split, seen) for i in range(count)]


def _fresh(task: VerifiableTask, level: int, rng: random.Random, split: Split, seen: set[str]) -> Problem:
    for _ in range(TRIES):
        problem = task.draw(level, rng)
        if problem.question not in seen and split_of(problem.question) == split:
            seen.add(problem.question)
            return problem
    raise InputError(f"level {level} of {task.name} has no more problems in split {split!r}; ask for fewer")


def by_difficulty(problems: Iterable[Problem]) -> dict[int, list[int]]:
    """Positions of the problems of each level, the easiest level first."""
    buckets: dict[int, list[int]] = {}
    for i, problem in enumerate(problems):
        buckets.setdefault(problem.difficulty, []).append(i)
    return dict(sorted(buckets.items()))


# --- arithmetic ----------------------------------------------------------------------------------------------------


def apply_sign(left: int, sign: str, right: int) -> int:
    """left + right, left - right or left * right."""
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


class Shape(NamedTuple):
    """What a level is made of."""

    terms: int
    products: int
    largest: int


class Arithmetic:
    """Sums of several terms, some of them products: "12+35-8*3=".

    Every term and every running total is a whole number from 0 to 999 (to 9999 on level 8). Levels grow in terms,
    products and size.
    """

    name = "arithmetic"
    levels = (1, 2, 3, 4, 5, 6, 7, 8)
    shapes: ClassVar[dict[int, Shape]] = {
        1: Shape(2, 0, 49),
        2: Shape(3, 0, 99),
        3: Shape(3, 1, 99),
        4: Shape(4, 1, 99),
        5: Shape(5, 2, 99),
        6: Shape(7, 2, 99),
        7: Shape(10, 4, 99),
        8: Shape(7, 2, 999),
    }

    def draw(self, level: int, rng: random.Random) -> Problem:
        shape = self.shapes[level]
        while True:
            question = self._question(shape, rng)
            totals = self.totals(question)
            if min(totals) >= 0 and max(totals) <= (9999 if shape.largest > 99 else 999):
                return Problem(f"arithmetic-{level}-{question[:-1]}", question, str(totals[-1]), level)

    def totals(self, question: str) -> list[int]:
        """The right value of every operation, in the order of `evaluate`; the last one is the answer."""
        found: list[int] = []

        def solve(left: int, sign: str, right: int) -> int:
            found.append(apply_sign(left, sign, right))
            return found[-1]

        self.evaluate(question, solve)
        return found

    def evaluate(self, question: str, solve: Callable[[int, str, int], int]) -> int:
        """The answer, with `solve(left, sign, right)` called for every operation in order: the products from left to
        right, then the sum from left to right.

        Raises:
            InputError: the question is no sum of whole numbers and products that ends in "=".
        """
        if not re.fullmatch(r"\d+(\*\d+)?([+-]\d+(\*\d+)?)*=", question):
            raise InputError(f"{question!r} is no such question; write for example '12+35-8*3='")
        terms = [
            (sign, solve(int(left), "*", int(right)) if right else int(left))
            for sign, left, right in re.findall(r"([+-]?)(\d+)(?:\*(\d+))?", question)
        ]
        total = terms[0][1]
        for sign, value in terms[1:]:
            total = solve(total, sign, value)
        return total

    def check(self, problem: Problem, text: str) -> bool:
        """Whether the text after the last end of thinking is the answer and nothing else."""
        answer = text.rsplit("</think>", 1)[-1].strip()
        return answer.isdecimal() and int(answer) == int(problem.answer)

    def _question(self, shape: Shape, rng: random.Random) -> str:
        products = set(rng.sample(range(shape.terms), shape.products))
        text = ""
        for i in range(shape.terms):
            text += rng.choice("+-") if i else ""
            text += f"{rng.randint(3, shape.largest)}"
            text += f"*{rng.randint(2, 9)}" if i in products else ""
        return text + "="
