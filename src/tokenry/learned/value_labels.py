"""Labels of tokens, counted: of the solutions that share a prefix, how many are right.

Paper: Token-Supervised Value Models for Enhancing Mathematical Problem-Solving Capabilities of Large Language Models,
arXiv 2407.12863. For solution n and its first k tokens

    V[n, k] = #{m : t_m,1..k = t_n,1..k and m is right} / #{m : t_m,1..k = t_n,1..k},

the Monte-Carlo estimate of the probability that a text with this prefix ends right. Identical solutions count as often
as they were drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..core.errors import InputError

__all__ = ["PrefixValues", "prefix_values", "token_value_labels"]


class PrefixValues(NamedTuple):
    """Of the N solutions to one question, after each of their tokens.

    Attributes:
        labels: N arrays (T_n,), the share of right ones among the solutions with this prefix.
        counts: N arrays (T_n,), how many solutions have it.
    """

    labels: list[np.ndarray]
    counts: list[np.ndarray]


def token_value_labels(
    solutions: Sequence[Sequence[int]], correct: Sequence[float], min_count: int = 1
) -> list[list[float]]:
    """The label of every token of the solutions to one question.

    Args:
        solutions: token ids; prefixes are equal where their ids are.
        correct: a grade in [0, 1] for each solution.
        min_count: labels from fewer solutions are NaN, which training leaves out.

    Raises:
        InputError: fewer than 2 solutions, an empty one, as many grades as there are not solutions, a grade outside
            [0, 1], or min_count < 1.
    """
    if min_count < 1:
        raise InputError(f"min_count={min_count} is not allowed; give a whole number >= 1")
    found = prefix_values(solutions, correct)
    return [np.where(n >= min_count, v, np.nan).tolist() for v, n in zip(*found)]


def prefix_values(solutions: Sequence[Sequence[int]], correct: Sequence[float]) -> PrefixValues:
    """Labels and counts of the prefixes of the solutions to one question; refuses what `token_value_labels` does."""
    grades = checked_grades(solutions, correct)
    lengths = np.array([len(ids) for ids in solutions])
    labels = [np.full(length, grade) for length, grade in zip(lengths, grades)]  # as they are where nobody shares them
    counts = [np.ones(length, dtype=int) for length in lengths]
    for depth, rows, nodes in _levels(solutions, lengths):
        size = np.bincount(nodes)
        value = np.bincount(nodes, grades[rows]) / size.clip(min=1)
        for row, node in zip(rows.tolist(), nodes.tolist()):
            labels[row][depth], counts[row][depth] = value[node], size[node]
    return PrefixValues(labels, counts)


def _levels(solutions: Sequence[Sequence[int]], lengths: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The trie by depth: which solutions share a node with others there, and its number for each of them.

    A solution leaves with the first token that it shares with no other: all that follow are its own.
    """
    ids = np.zeros((len(solutions), int(lengths.max())), dtype=np.int64)
    for row, solution in enumerate(solutions):
        ids[row, : lengths[row]] = solution
    rows, nodes = np.arange(len(solutions)), np.zeros(len(solutions), dtype=np.int64)
    vocabulary = int(ids.max()) + 1
    for depth in range(ids.shape[1]):
        alive = lengths[rows] > depth
        rows, nodes = rows[alive], nodes[alive]
        _, nodes, size = np.unique(nodes * vocabulary + ids[rows, depth], return_inverse=True, return_counts=True)
        shared = size[nodes] > 1
        rows, nodes = rows[shared], nodes[shared]
        if not len(rows):
            return
        yield depth, rows, nodes


def checked_grades(solutions: Sequence[Sequence[int]], correct: Sequence[float]) -> np.ndarray:
    """The grades (N,) of solutions that can be labeled."""
    if len(solutions) < 2:
        raise InputError(f"a question has {len(solutions)} solutions; draw at least 2, as values are shares of them")
    if len(solutions) != len(correct):
        raise InputError(f"{len(solutions)} solutions have {len(correct)} grades; give one for each")
    if not all(len(solution) for solution in solutions):
        raise InputError("a solution has no tokens; leave it out, or give at least its end-of-text token")
    grades = np.asarray(correct, dtype=float)
    if grades.ndim != 1 or not ((grades >= 0) & (grades <= 1)).all():
        raise InputError(f"grades from {grades.min():g} to {grades.max():g} are not allowed; give numbers in [0, 1]")
    return grades
