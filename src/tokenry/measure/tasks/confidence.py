"""The task `confidence`: a model solves problems greedily, and scores tell its right answers from its wrong ones."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.calibration import auroc, expected_calibration_error
from ...data.problems import Problem, VerifiableTask
from ...decode.api import generate
from ...decode.generation.output import DecodeOutput
from ...models.load import Loaded
from ...read.chains.backtrack import is_stop
from ...read.uqac import UQAC, ChainResult
from ...text.answers import find_answer, normalise_answer
from ...text.spans import Span
from ...trace.trace import Trace
from ..task import Arm, Metric, Outcome, Sample, Statistic

__all__ = ["DRAWN", "ConfidenceTask"]

DRAWN = 10  # samples of a vote
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0}
LENGTH = 256


class Score(NamedTuple):
    """What orders answers, and the same as a probability, where it is one."""

    value: float
    probability: float


@dataclass
class Answered:
    """A greedy solution with its answer, what tells how it came about, and what reading that cost."""

    trace: Trace
    span: Span
    answer: str
    right: bool
    chain: ChainResult
    spent: Spent

    @property
    def begin(self) -> int:
        """The first token of the solution."""
        return self.trace.spans["prompt"][0][1]


@dataclass
class Spent:
    """Forward passes of a model, the tokens fed to it, and seconds."""

    forwards: float = 0
    fed: float = 0
    seconds: float = 0.0

    def cost(self, generated: float = 0) -> dict[str, float]:
        return {
            "seconds": self.seconds,
            "tokens": generated,
            "forward_passes": float(self.forwards),
            "tokens_processed": float(self.fed),
        }


@contextmanager
def counting(model: PreTrainedModel, before: Spent | None = None) -> Iterator[Spent]:
    """Counts what the model is called for, on top of what was spent before."""
    spent = Spent() if before is None else Spent(before.forwards, before.fed, before.seconds)

    def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        spent.forwards += 1
        spent.fed += args[0].numel()

    hook, start = model.register_forward_pre_hook(count), time.perf_counter()
    try:
        yield spent
    finally:
        spent.seconds += time.perf_counter() - start
        hook.remove()


def _discernment(table: Mapping[str, np.ndarray]) -> float:
    known = ~np.isnan(table["score"])
    return auroc(table["score"][known], table["right"][known])


def _miscalibration(table: Mapping[str, np.ndarray]) -> float:
    known = ~np.isnan(table["confidence"])
    if not known.any():
        return math.nan
    return expected_calibration_error(table["confidence"][known], table["right"][known])


class ConfidenceTask:
    """Problems that are each solved once, greedily; all arms score the same answer.

    An arm's `apply` is the name of a score: "answer" and "whole" (the probability of the answer's tokens, or of all),
    "mean" (of all log-probabilities, as a probability), "length", "samples" (the share of further solutions with the
    same answer), "random" (as "uqac", with as many positions drawn from all that its walk may stop at) or "uqac".
    Costs are those beyond the solution itself, whose log-probabilities come with it. What was cut off has no answer,
    and is scored by none.
    """

    slug: ClassVar[str] = "confidence"
    stage: ClassVar[str] = "read"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("score", None, "the score of the answer"),
        Metric("confidence", None, "the score, where it is a probability"),
        Metric("right", None, "share of right answers, the same for every score"),
    )
    statistics: ClassVar[Sequence[Statistic]] = (
        Statistic("ece", "lower", "calibration error of the confidence, 20 equal bins", _miscalibration),
        Statistic("auroc", "higher", "probability that a right answer scores above a wrong one", _discernment),
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: VerifiableTask,
        problems: Sequence[Problem],
        method: UQAC,
    ) -> None:
        self.model, self.tokenizer, self.task, self.problems, self.method = model, tokenizer, task, problems, method
        self.setting = {"drawn": DRAWN, "length": LENGTH, **SAMPLING, **method.model_dump(mode="json")}
        self._last: tuple[tuple[str, ...], list[Answered | None]] | None = None

    def samples(self) -> list[Sample]:
        return [Sample(p.id, p.question, {"index": i, "level": p.difficulty}) for i, p in enumerate(self.problems)]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        answered = self._answered(samples)
        if arm.apply == "samples":
            return self._voted(samples, answered, seed)
        return [_unanswered() if one is None else self._outcome(arm.apply, one, seed) for one in answered]

    def _outcome(self, name: str, one: Answered, seed: int) -> Outcome:
        before = one.spent if name in ("uqac", "random") else None
        with counting(self.model, before) as spent:
            score = self._score(name, one, seed)
        return Outcome(_metrics(score, one.right), spent.cost(), _detail(one, score.value))

    def _score(self, name: str, one: Answered, seed: int) -> Score:
        trace, new = one.trace, one.trace.logprob[one.begin :]
        if name == "answer":
            found = math.exp(float(trace.logprob[slice(*one.span)].sum()))
        elif name == "whole":
            found = math.exp(float(new.sum()))
        elif name == "mean":
            found = math.exp(float(new.mean()))
        elif name == "length":
            return Score(1 / len(new), math.nan)
        else:
            kept = self.method.kept(trace, one.span, one.chain)
            kept = self._elsewhere(one, len(kept), seed) if name == "random" else kept
            found = self.method.marginal(self.model, trace, one.span, kept)
        return Score(found, found)

    def _elsewhere(self, one: Answered, count: int, seed: int) -> list[int]:
        """Positions of the solution drawn from all that are no stop words and not the answer's."""
        pieces = [one.trace.text[a:b] for a, b in one.trace.offsets.tolist()]
        places = [i for i in range(one.begin, len(pieces)) if not is_stop(pieces[i])]
        places = [i for i in places if not one.span[0] <= i < one.span[1]]
        return sorted(random.Random(f"{seed} {one.trace.text}").sample(places, min(count, len(places))))

    # --- solutions ---------------------------------------------------------------------------------------------------

    def _generate(self, questions: Sequence[str], **options: Any) -> DecodeOutput:
        return generate(self.model, self.tokenizer, list(questions), max_new_tokens=LENGTH, **options)

    def _answer(self, ids: Sequence[int], text: str) -> str | None:
        """The answer of a solution that came to its end."""
        span = find_answer(text, self.method.marker) if ids[-1] == self.tokenizer.eos_token_id else None
        return None if span is None else normalise_answer(text[slice(*span)])

    def _answered(self, samples: Sequence[Sample]) -> list[Answered | None]:
        """The solution of each sample. All arms of a batch share them."""
        key = tuple(sample.id for sample in samples)
        if self._last is None or self._last[0] != key:
            output = self._generate([sample.prompt for sample in samples], do_sample=False)
            rows = zip(samples, output.prompt_ids, output.new_ids, cast(list[str], output.texts), strict=True)
            self._last = key, [self._traced(*row) for row in rows]
        return self._last[1]

    def _traced(self, sample: Sample, prompt: list[int], ids: list[int], text: str) -> Answered | None:
        answer = self._answer(ids, text)
        if answer is None:
            return None
        method, whole = self.method, torch.tensor(prompt + ids)
        with counting(self.model) as spent:
            trace = method.trace_ids(whole, len(prompt), Loaded(self.model, self.tokenizer))
            span = method.answer_span(trace)
            chain = method.attention_chain(trace, span)
        right = self.task.check(self.problems[sample.data["index"]], text)
        return Answered(trace, span, answer, right, chain, spent)

    def _voted(self, samples: Sequence[Sample], answered: Sequence[Answered | None], seed: int) -> list[Outcome]:
        asked = [sample.prompt for sample in samples for _ in range(DRAWN)]
        start = time.perf_counter()
        output = self._generate(asked, seed=1_000_003 * seed + samples[0].data["index"], **SAMPLING)
        seconds = (time.perf_counter() - start) / len(samples)
        calls, fed = (count / len(samples) for count in (output.forward_calls, output.tokens_processed))
        rows = list(zip(output.new_ids, cast(list[str], output.texts), strict=True))
        outcomes = []
        for one in answered:
            drawn, rows = rows[:DRAWN], rows[DRAWN:]
            if one is None:
                outcomes.append(_unanswered())
                continue
            share = float(np.mean([self._answer(*row) == one.answer for row in drawn]))
            cost = Spent(calls, fed, seconds).cost(sum(len(ids) for ids, _ in drawn))
            outcomes.append(Outcome(_metrics(Score(share, share), one.right), cost, _detail(one, share)))
        return outcomes


def _metrics(score: Score, right: bool) -> dict[str, float]:
    return {"score": score.value, "confidence": score.probability, "right": float(right)}


def _unanswered() -> Outcome:
    return Outcome(dict.fromkeys(("score", "confidence", "right"), math.nan), {}, {"note": "cut off"})


def _detail(one: Answered, score: float) -> dict[str, Any]:
    return {"note": f"{'right' if one.right else 'wrong'}, {score:.3f}: {one.trace.text}"}
