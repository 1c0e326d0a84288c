"""The task `self-drafting`: problems solved one token at a time, and by guesses that are checked.

A text that is drafted and checked greedily must be the one that comes token by token, whoever guesses. So guesses of
other kinds, fed in the same rows, say what the learned ones are worth.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.problems import Arithmetic, Problem
from ...decode.api import generate
from ...decode.generation.sequence import SequenceState
from ...decode.speculation.self_draft import SelfDrafting, TiDARLoop
from ..cost import Meter
from ..task import Arm, Metric, Outcome, Sample
from .generated import generation_cost

__all__ = ["Guess", "OtherGuesses", "Plan", "SelfDraftingTask", "bigram", "random_tokens", "repeat"]

MAX_NEW_TOKENS = 256

Guess = Callable[[list[int], int], list[int]]  # the ids so far and a count: so many guesses of what follows


class Plan(NamedTuple):
    """How an arm writes: a model, what drafts for it if anything does, and the temperature; 0 is greedy."""

    model: PreTrainedModel
    speculation: Any = None
    temperature: float = 0.0


# --- guesses of other kinds ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OtherGuesses(SelfDrafting):
    """The same rows as in TiDAR, but what the masks say is not used: `guess` says what is checked."""

    guess: Guess = field(kw_only=True)

    def loop(self, *args: Any, **options: Any) -> TiDARLoop:
        return _OtherLoop(self, *args, **options)


class _OtherLoop(TiDARLoop):
    def _scores(self, row: SequenceState, masked: Tensor) -> Tensor:
        tokens = cast(OtherGuesses, self.speculation).guess(row.prompt + row.ids, len(masked) - 1)
        scores = torch.full_like(masked[1:], -torch.inf)
        return scores.scatter(1, torch.tensor(tokens, device=scores.device)[:, None], 0.0)


def random_tokens(vocabulary: int) -> Guess:
    """Any tokens below `vocabulary`; the same text gets the same ones."""
    return lambda ids, count: random.Random(str(ids)).choices(range(vocabulary), k=count)


def repeat(ids: list[int], count: int) -> list[int]:
    """The last token again and again."""
    return [ids[-1]] * count


def bigram(texts: Iterable[Sequence[int]], vocabulary: int) -> Guess:
    """The most frequent follower of a token in these texts, and its follower, and so on."""
    counts = np.zeros((vocabulary, vocabulary), dtype=int)
    for ids in texts:
        np.add.at(counts, (ids[:-1], ids[1:]), 1)
    follower = counts.argmax(1).tolist()

    def guess(ids: list[int], count: int) -> list[int]:
        chain = [ids[-1]]
        for _ in range(count):
            chain.append(follower[chain[-1]])
        return chain[1:]

    return guess


# --- the task --------------------------------------------------------------------------------------------------------


class SelfDraftingTask:
    """Arithmetic problems, one at a time. An arm's `apply` is a `Plan`.

    Args:
        once: the seed for which greedy arms run; for others, where they would write the same, they do nothing.
    """

    slug: ClassVar[str] = "self-drafting"
    stage: ClassVar[str] = "decode"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("accuracy", "higher", "share of problems answered rightly"),
        Metric("acceptance", "higher", "share of positions with guesses where the guess came out"),
        Metric("emitted", None, "tokens after the first"),
        Metric("target_calls", None, "forward passes after the prompt's"),
    )

    def __init__(self, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], once: int) -> None:
        self.tokenizer, self.once, self.task = tokenizer, once, Arithmetic()
        self.setting = {"once": once}
        self.problems = {problem.id: problem for problem in problems}

    def samples(self) -> list[Sample]:
        return [Sample(p.id, p.question, {"index": i}) for i, p in enumerate(self.problems.values())]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        plan = arm.apply
        if plan.temperature == 0 and seed != self.once:
            return [Outcome({}) for _ in samples]
        return [self._solve(plan, self.problems[s.id], 100_000 * seed + s.data["index"]) for s in samples]

    def _solve(self, plan: Plan, problem: Problem, seed: int) -> Outcome:
        sampling = {"do_sample": True, "temperature": plan.temperature, "top_k": 0, "seed": seed}
        with Meter() as meter:
            output = generate(
                plan.model,
                self.tokenizer,
                problem.question,
                speculation=plan.speculation,
                max_new_tokens=MAX_NEW_TOKENS,
                **(sampling if plan.temperature else {}),
            )
        ids = output.new_ids[0]
        right = ids[-1] == self.tokenizer.eos_token_id and self.task.check(problem, output.texts[0])
        calls = {"emitted": len(ids) - 1, "target_calls": len(ids) - 1}
        positions: list[list[int]] = []
        if plan.speculation:
            calls = {name: getattr(output.stats, name) for name in calls}
            positions = [[p.depth, int(p.taken)] for p in cast(Any, output.stats).positions]
        metrics = {"accuracy": float(right), **{name: float(count) for name, count in calls.items()}}
        if positions:
            metrics["acceptance"] = float(np.mean([taken for _, taken in positions]))
        note = f"level {problem.difficulty}: {'right' if right else 'wrong'}; {output.texts[0]!r}"
        return Outcome(metrics, generation_cost(output, 0, meter), {"note": note, "positions": positions, "ids": ids})
