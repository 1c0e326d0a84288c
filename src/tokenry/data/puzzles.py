"""Puzzles whose answers have a known length: sums written from the right, sorting of digits, 4 x 4 sudoku, lists.

Each tells apart a kind of dependence between the tokens of an answer. A sum has carries that run along it, in sorting
each digit depends on how many came before, and a sudoku with few clues has several solutions, so that every cell that
is filled decides about others. In a list each token follows from its neighbors, and only the length is far away.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import permutations

from .problems import Problem, VerifiableTask

__all__ = ["LISTING", "PUZZLES", "Addition", "Listing", "Sorting", "Sudoku", "kind_of"]

EMPTY = "."


class Addition:
    """Two numbers of `level` digits and their sum, written from the last digit on, the two filled up to six columns.

    "add 843000+257000=" is 348 + 752 and has the answer "0011". Digits that belong together are equally far apart.
    """

    name = "addition"
    levels = (2, 3, 4, 5, 6)
    columns = 6

    def draw(self, level: int, rng: random.Random) -> Problem:
        left, right = (rng.randint(10 ** (level - 1), 10**level - 1) for _ in range(2))
        question = "+".join(str(number)[::-1].ljust(self.columns, "0") for number in (left, right))
        return Problem(f"add-{question}", f"add {question}=", str(left + right)[::-1], level)

    def check(self, problem: Problem, text: str) -> bool:
        return text.strip() == problem.answer


class Sorting:
    """`level` digits in order: "sort 4092=" has the answer "0249"."""

    name = "sorting"
    levels = (3, 4, 6, 8, 10)

    def draw(self, level: int, rng: random.Random) -> Problem:
        digits = "".join(rng.choice("0123456789") for _ in range(level))
        return Problem(f"sort-{digits}", f"sort {digits}=", "".join(sorted(digits)), level)

    def check(self, problem: Problem, text: str) -> bool:
        return text.strip() == problem.answer


class Sudoku:
    """A 4 x 4 sudoku with `level` empty cells, row by row; the answer is the whole grid, and any solution is right."""

    name = "sudoku"
    levels = (4, 6, 8, 10, 12, 14)

    def draw(self, level: int, rng: random.Random) -> Problem:
        grid, empty = rng.choice(grids()), set(rng.sample(range(16), level))
        shown = "".join(EMPTY if i in empty else cell for i, cell in enumerate(grid))
        return Problem(f"sudoku-{shown}", f"sudoku {shown}=", grid, level)

    def check(self, problem: Problem, text: str) -> bool:
        return text.strip() in self.solutions(problem)

    def solutions(self, problem: Problem) -> list[str]:
        """All grids that fit."""
        shown = problem.question.split(" ")[1][:-1]
        return [grid for grid in grids() if all(clue in (EMPTY, cell) for clue, cell in zip(shown, grid))]


class Listing:
    """Four letters, `level` times, numbered: "list caeb*2=" has the answer "1caeb2caeb"; the longest has 40 tokens."""

    name = "listing"
    levels = (1, 2, 3, 4, 5, 6, 7, 8)
    letters = "abcdefgh"

    def draw(self, level: int, rng: random.Random) -> Problem:
        text = "".join(rng.sample(self.letters, 4))
        answer = "".join(f"{number}{text}" for number in range(1, level + 1))
        return Problem(f"list-{text}-{level}", f"list {text}*{level}=", answer, level)

    def check(self, problem: Problem, text: str) -> bool:
        return text.strip() == problem.answer


@cache
def grids() -> tuple[str, ...]:
    """All 288 solved 4 x 4 sudokus, row by row."""
    rows = ["".join(row) for row in permutations("1234")]

    def fits(grid: list[str], row: str) -> bool:
        columns = all(above[i] != row[i] for above in grid for i in range(4))
        boxes = len(grid) % 2 == 0 or not ({*grid[-1][:2]} & {*row[:2]})
        return columns and boxes

    found: list[list[str]] = [[]]
    for _ in range(4):
        found = [[*grid, row] for grid in found for row in rows if fits(grid, row)]
    return tuple("".join(grid) for grid in found)


PUZZLES: tuple[VerifiableTask, ...] = (Addition(), Sorting(), Sudoku())
LISTING: VerifiableTask = Listing()


def kind_of(problem: Problem) -> VerifiableTask:
    """The task that a problem of this module belongs to."""
    kinds = {"add": PUZZLES[0], "sort": PUZZLES[1], "sudoku": PUZZLES[2], "list": LISTING}
    return kinds[problem.question.split(" ")[0]]
