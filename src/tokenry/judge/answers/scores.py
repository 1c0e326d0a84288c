"""Scores: what a scorer says of many solutions, by prompt, as a table, as JSON, as preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...core.schemas import Exchanged
from .choice import best_of_n, build_crew_pairs, weighted_vote
from .samples import Judged

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ScoredPrompt", "Scores"]


class ScoredSolution(Exchanged):
    """One solution as JSON."""

    score: float | None
    answer: str | None
    correct: bool | None


class WonVote(Exchanged):
    """The answer that won, and its share of all weight."""

    answer: str
    share: float


class ScoredPrompt(Exchanged):
    """One prompt as JSON; `best` is the place of the best solution."""

    prompt: str
    solutions: list[ScoredSolution]
    best: int | None
    vote: WonVote | None


@dataclass(frozen=True)
class Scores:
    """Solutions and their worth, in the order in which they were given."""

    judged: Sequence[Judged]

    @property
    def values(self) -> list[float | None]:
        """The worth of each solution; None where no answer was found, never 0."""
        return [one.score for one in self.judged]

    def pairs(self, top_k: int = 10, min_gap: float | None = None) -> Dataset:
        """Preference pairs of right and wrong solutions, see `build_crew_pairs`."""
        return build_crew_pairs(self.judged, top_k, min_gap)

    def by_prompt(self) -> list[ScoredPrompt]:
        """The solutions of each prompt, which of them is the best, and what a vote weighted by the scores says."""
        groups: dict[str, list[Judged]] = {}
        for one in self.judged:
            groups.setdefault(one.prompt, []).append(one)
        return [_scored(prompt, group) for prompt, group in groups.items()]

    def to_json(self) -> list[dict[str, Any]]:
        """`by_prompt` as JSON values."""
        return [one.model_dump() for one in self.by_prompt()]

    def table(self) -> str:
        """`by_prompt` as lines of text."""
        return "\n".join(line for one in self.by_prompt() for line in _lines(one))


def _scored(prompt: str, group: Sequence[Judged]) -> ScoredPrompt:
    best = best_of_n(group) if len(group) > 1 else None
    vote = weighted_vote(group) if len(group) > 1 else None
    return ScoredPrompt(
        prompt=prompt,
        solutions=[ScoredSolution(score=s.score, answer=s.answer, correct=s.correct) for s in group],
        best=None if best is None else next(i for i, one in enumerate(group) if one is best),
        vote=None if vote is None else WonVote(**vote._asdict()),
    )


def _lines(one: ScoredPrompt) -> list[str]:
    last = one.prompt.strip().splitlines()[-1]
    lines = [last if len(last) <= 100 else "... " + last[-96:]]
    for i, solution in enumerate(one.solutions):
        score = "  none" if solution.score is None else f"{solution.score:6.3f}"
        right = {True: "  right", False: "  wrong", None: ""}[solution.correct]
        best = "  best" if i == one.best else ""
        lines.append(f"  {i + 1:>3}  {score}  {solution.answer or 'no answer found'}{right}{best}")
    if one.vote:
        lines.append(f"  vote: {one.vote.answer} with {one.vote.share:.0%} of the weight")
    return lines
