"""The task `values`: what is told of solutions before they end, and which answer it leads to for the same tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.calibration import brier
from ...data.problems import Problem, VerifiableTask
from ...decode.reasoning.tree_search import TreeShape, step_beam_search
from ...learned.token_values import TokenValueModel
from ...models.batch import right_padded
from ...models.load import Loaded
from ...models.prompts import prompt_ids
from ..task import Arm, Metric, Outcome, Sample

__all__ = ["SHARES", "Choice", "Drawn", "ValuesTask", "Verifier"]

SHARES = (25, 50, 75, 100)  # percent of a solution that has been written
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0}
Verifier = TokenValueModel | Callable[[list[int], list[int]], float]


class Drawn(NamedTuple):
    """Solutions to a problem in tokens, their answers (None where they did not end), and whether they are right."""

    solutions: list[list[int]]
    answers: list[str | None]
    right: list[bool]


class Choice(NamedTuple):
    """How an arm chooses an answer: a search led by a verifier, the best of n, or a vote (no verifier)."""

    how: str
    verifiers: Mapping[int, Verifier] | None = None


class ValuesTask:
    """Problems with solutions that were drawn beforehand. The `apply` of an arm is a verifier for each seed, which says
    the value of every prefix; or a `Choice`, which ends in an answer.

    All choices may feed as many tokens to the models as the search of `reference` does on the same problem with the
    same seed: a vote feeds those of the solutions, the best of n feeds them to the value model, too.
    """

    slug: ClassVar[str] = "values"
    stage: ClassVar[str] = "judge"
    metrics: ClassVar[Sequence[Metric]] = (
        *(Metric(f"brier_{s}", "lower", f"squared error of the value after {s} % of a solution") for s in SHARES),
        Metric("brier_early", "lower", "the mean of those after 25, 50 and 75 %"),
        Metric("accuracy", "higher", "share of problems answered rightly for the tokens of a search"),
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: VerifiableTask,
        problems: Sequence[Problem],
        drawn: Sequence[Drawn],
        reference: Mapping[int, Verifier],
        shape: TreeShape,
        max_new_tokens: int,
    ) -> None:
        self.loaded, self.task, self.problems, self.drawn = Loaded(model, tokenizer), task, problems, drawn
        self.reference, self.shape, self.max_new_tokens = reference, shape, max_new_tokens
        self.setting = {
            **vars(shape),
            **SAMPLING,
            "max_new_tokens": max_new_tokens,
            "drawn": len(drawn[0].solutions) if drawn else 0,
        }
        self._searched: dict[tuple, tuple[bool, int, int]] = {}

    def samples(self) -> list[Sample]:
        return [Sample(p.id, p.question, {"index": i, "level": p.difficulty}) for i, p in enumerate(self.problems)]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        apply, places = arm.apply, [sample.data["index"] for sample in samples]
        if isinstance(apply, Choice):
            return [self._chosen(apply, place, seed) for place in places]
        return [self._told(apply, place, seed) for place in places]

    # --- what prefixes are worth ---------------------------------------------------------------------------

    def _told(self, verifiers: Mapping[int, Verifier], index: int, seed: int) -> Outcome:
        drawn = self.drawn[index]
        values = self.values(verifiers[seed], index, drawn.solutions)
        told = np.array([[row[max(round(s / 100 * len(row)), 1) - 1] for s in SHARES] for row in values])
        errors = [brier(after, drawn.right) for after in told.T]
        metrics = {f"brier_{share}": error for share, error in zip(SHARES, errors)}
        pairs = [[*(round(float(v), 5) for v in row), int(ok)] for row, ok in zip(told, drawn.right)]
        return Outcome(metrics | {"brier_early": float(np.mean(errors[:3]))}, {}, {"index": index, "scored": pairs})

    def values(self, verifier: Verifier, index: int, solutions: Sequence[list[int]]) -> list[list[float]]:
        """The value after each token of the solutions."""
        start = prompt_ids(self.loaded.tokenizer, self.problems[index].question)
        if not isinstance(verifier, TokenValueModel):
            return [[verifier(start, ids[: k + 1]) for k in range(len(ids))] for ids in solutions]
        ids, mask = right_padded([start + solution for solution in solutions])
        found = verifier.score(ids, mask.long())[:, len(start) :].tolist()
        return [row[: len(solution)] for row, solution in zip(found, solutions)]

    # --- which answer it is ----------------------------------------------------------------------------------

    def _chosen(self, choice: Choice, index: int, seed: int) -> Outcome:
        verifier = choice.verifiers[seed] if choice.verifiers else None
        if choice.how == "search":
            right, fed, written = self._search(verifier, index, seed)
            return Outcome({"accuracy": float(right)}, {"tokens": written, "tokens_processed": fed}, {"index": index})
        budget = self._search(self.reference[seed], index, seed)[1]
        order = np.random.default_rng([seed, index]).permutation(len(self.drawn[index].solutions)).tolist()
        picked, fed = self._affordable(order, index, budget, reads=1 if verifier is None else 2)
        right = self._vote(picked, index) if verifier is None else self._best(verifier, picked, index)
        written = sum(len(self.drawn[index].solutions[i]) for i in picked)
        cost = {"tokens": float(written), "tokens_processed": float(fed)}
        return Outcome({"accuracy": float(right)}, cost, {"index": index, "solutions": len(picked)})

    def _affordable(self, order: Sequence[int], index: int, budget: int, reads: int) -> tuple[list[int], int]:
        """The first solutions whose tokens, read by so many models, fit into the budget: at least one."""
        fed = reads * len(prompt_ids(self.loaded.tokenizer, self.problems[index].question))
        picked: list[int] = []
        for i in order:
            more = reads * len(self.drawn[index].solutions[i])
            if picked and fed + more > budget:
                break
            picked.append(i)
            fed += more
        return picked, fed

    def _vote(self, picked: Sequence[int], index: int) -> bool:
        """Whether the most frequent answer, the first seen of equals, is right."""
        drawn = self.drawn[index]
        counts = Counter(drawn.answers[i] for i in picked if drawn.answers[i] is not None)
        winner = max(counts, key=counts.__getitem__, default=None)
        return any(drawn.right[i] for i in picked if drawn.answers[i] == winner) if winner is not None else False

    def _best(self, verifier: Verifier, picked: Sequence[int], index: int) -> bool:
        """Whether the finished solution of the highest value is right."""
        drawn = self.drawn[index]
        values = self.values(verifier, index, [drawn.solutions[i] for i in picked])
        ended = [(row[-1], i) for row, i in zip(values, picked) if drawn.answers[i] is not None]
        return drawn.right[max(ended, key=lambda pair: pair[0])[1]] if ended else False

    def _search(self, verifier: Any, index: int, seed: int) -> tuple[bool, int, int]:
        """Whether a search finds the answer, the tokens fed to both models and those written; asked once."""
        key = (id(verifier), index, seed)
        if key not in self._searched:
            problem = self.problems[index]
            found = step_beam_search(
                self.loaded,
                verifier,
                problem.question,
                self.shape,
                max_new_tokens=self.max_new_tokens,
                seed=100_003 * seed + index,
                **SAMPLING,
            )
            text = self.loaded.tokenizer.decode(found.best.ids, skip_special_tokens=True)
            right = bool(found.finished) and self.task.check(problem, cast(str, text))
            self._searched[key] = right, found.fed + found.value_fed, found.written
        return self._searched[key]
