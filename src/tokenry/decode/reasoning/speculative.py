"""Speculative reasoning: a small model writes steps, the base model judges them and writes those that it rejects."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ...core.errors import InputError
from ...models.load import Loaded
from ...models.prompts import listed_prompts
from .scores import HIGHEST, LOWEST, DigitScorer, StepScore, StepScorer
from .step_prompts import Messages, StepPrompts, prompts_for
from .steps import Draft, StepModel

__all__ = ["ReasoningResult", "ReasoningStats", "SpeculativeReasoner", "StepRecord", "step_speedup"]


SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
FEW_DIGITS = 0.5  # share of the probability below which a warning says that the judge gives no scores
SMALL_STREAM = 0x5DEECE66D  # the two models must not draw the same random numbers, or they would err together


# --- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepRecord:
    """One kept step.

    Attributes:
        text: without its separator.
        source: the model that wrote it.
        score: of the small model's candidate; None where there was none, or nobody judged it.
        rejected_text: the candidate that was thrown away.
        small_tokens, base_tokens: written by each model, thrown away or not.
        seconds: wall clock, in a batch an equal share of it.
        end: what ended it.
    """

    text: str
    source: Literal["small", "base"]
    score: StepScore | None
    rejected_text: str | None
    small_tokens: int
    base_tokens: int
    seconds: float
    end: Literal["separator", "eos", "length"]

    @property
    def kept_tokens(self) -> int:
        return self.small_tokens if self.source == "small" else self.base_tokens


@dataclass(frozen=True)
class ReasoningStats:
    """What a text cost. `judge_tokens` are those the base model read to judge; seconds are shares in a batch."""

    small_tokens: int
    base_tokens: int
    kept_tokens: int
    judged: int
    accepted: int
    judge_tokens: int
    digit_mass: float  # mean probability of the digits where the score stands; NaN without
    small_seconds: float
    base_seconds: float
    judge_seconds: float

    @property
    def acceptance(self) -> float:
        """Share of judged steps that were kept; NaN if none was judged."""
        return self.accepted / self.judged if self.judged else math.nan


@dataclass(frozen=True)
class ReasoningResult:
    """The text after the prompt, its steps, and why it ended: "finished", "repeated", "budget" or "context"."""

    text: str
    steps: list[StepRecord]
    stop_reason: Literal["finished", "repeated", "budget", "context"]
    stats: ReasoningStats


def step_speedup(acceptance: float, t_small: float, t_base: float, t_verify: float, step_tokens: float) -> float:
    """How many times faster than the base model alone, by the latency model of arXiv 2504.07891.

    m t_B / (m t_S + t_v + (1 - a) m t_B): a step of m tokens is written by the small model, judged, and written again
    where it is rejected. Above 1 exactly if a > t_S / t_B + t_v / (m t_B).

    Args:
        acceptance: a, share of steps that are kept.
        t_small, t_base: seconds per token.
        t_verify: seconds per judgment.
        step_tokens: m, tokens per step.
    """
    if not 0 <= acceptance <= 1:
        raise InputError(f"acceptance={acceptance} is not allowed; give a share in [0, 1]")
    for name, value in (("t_small", t_small), ("t_base", t_base), ("step_tokens", step_tokens)):
        if not 0 < value < math.inf:
            raise InputError(f"{name}={value} is not allowed; give a number > 0")
    if not 0 <= t_verify < math.inf:
        raise InputError(f"t_verify={t_verify} is not allowed; give seconds >= 0")
    plain = step_tokens * t_base
    return plain / (step_tokens * t_small + t_verify + (1 - acceptance) * plain)


# --- the reasoner ----------------------------------------------------------------------------------------------------


class SpeculativeReasoner:
    """Writes step by step with two models (arXiv 2504.07891).

    Args:
        base, small: models with their tokenizers, as `tokenry.load` returns them. Vocabularies may differ.
        scorer: judges the steps; by default the base model's own digit.
        threshold: a step whose score is at least this is kept. At or below 0 all are, above 9 none.
        max_step_tokens: a step of this length ends without a separator and goes on in the next one.
        token_budget: most tokens of the kept steps.
        first_n_base_steps: steps at the beginning that the base model writes without speculation.
        prompts: the words around problem and steps; by default those the base model knows.
        options: what `generate` takes, for both models; by default temperature 0.6 and top-p 0.95.

    Raises:
        InputError: a threshold that is no number, a limit below 1, a tokenizer without a chat template.
    """

    def __init__(
        self,
        base: Loaded,
        small: Loaded,
        scorer: StepScorer | None = None,
        *,
        threshold: float = 7.0,
        max_step_tokens: int = 512,
        token_budget: int = 8192,
        first_n_base_steps: int = 0,
        prompts: StepPrompts | None = None,
        **options: Any,
    ) -> None:
        check_threshold(threshold)
        for name, value in (("max_step_tokens", max_step_tokens), ("token_budget", token_budget)):
            if value < 1:
                raise InputError(f"{name}={value} is not allowed; give a number of tokens >= 1")
        if first_n_base_steps < 0:
            raise InputError(f"first_n_base_steps={first_n_base_steps} is not allowed; give a number of steps >= 0")
        self.base, self.small = Loaded(*base), Loaded(*small)
        self.prompts = prompts or prompts_for(self.base.model)
        self.scorer = scorer or DigitScorer(*self.base, prompts=self.prompts)
        self.threshold, self.first_n_base_steps = threshold, first_n_base_steps
        self.max_step_tokens, self.token_budget = max_step_tokens, token_budget
        self.options = options or SAMPLING

    def generate(self, messages: Messages, *, seed: int | None = None) -> ReasoningResult:
        """Solve one problem: a text, or messages of which the last is the user's."""
        return self.generate_many([messages], seed=seed)[0]

    def generate_many(self, problems: Sequence[Messages], *, seed: int | None = None) -> list[ReasoningResult]:
        """Solve several problems step by step in one batch.

        Args:
            seed: makes sampling repeatable, row by row; None uses torch's global generator.
        """
        return self.run(problems, seed).results()

    def run(
        self, problems: Sequence[Messages], seed: int | None, on_step: Callable[[int, str], None] | None = None
    ) -> StepSpeculation:
        """The finished run behind `generate_many`; `on_step` is called with the row and the text of every kept step."""
        speculation = StepSpeculation(self, problems, seed)
        with torch.no_grad():
            while speculation.open:
                for row in speculation.round():
                    if on_step:
                        on_step(row.number, row.piece(row.steps[-1]))
        return speculation


@dataclass
class Solution:
    """One problem on its way."""

    number: int
    problem: Messages
    separator: str
    begin: dict[str, str]  # the text before the steps, for each model
    turn: str  # what asks for the score of a step, behind it
    limit: int = 0  # most tokens of the next step
    steps: list[StepRecord] = field(default_factory=list)
    stop_reason: str | None = None
    answering: bool = False  # thinking has ended: nobody judges the rest
    judge_tokens: int = 0

    @property
    def kept(self) -> int:
        return sum(step.kept_tokens for step in self.steps)

    @property
    def text(self) -> str:
        return "".join(self.piece(step) for step in self.steps)

    def piece(self, step: StepRecord) -> str:
        """The step as it stands in the text: one that was cut at its limit goes on without a separator."""
        return step.text + (self.separator if step.end == "separator" else "")

    def candidate(self, draft: Draft) -> tuple[list[str], str]:
        """The steps before, and the one that ends with this draft."""
        *before, begun = self.text.split(self.separator)
        return before, begun + draft.text


class StepSpeculation:
    """A batch of problems, round by round: propose, judge, keep or rewrite."""

    def __init__(self, reasoner: SpeculativeReasoner, problems: Sequence[Messages], seed: int | None) -> None:
        problems = listed_prompts(problems)
        if not problems:
            raise InputError("there are no problems; give at least one")
        self.reasoner, self.prompts = reasoner, reasoner.prompts
        pair = {"base": (reasoner.base, seed), "small": (reasoner.small, None if seed is None else seed + SMALL_STREAM)}
        begins = {name: [self.prompts.begin(one.tokenizer, p) for p in problems] for name, (one, _) in pair.items()}
        self.models = {
            name: StepModel(loaded, begins[name], not self.prompts.chat, own, reasoner.options)
            for name, (loaded, own) in pair.items()
        }
        self.base, self.small = self.models["base"], self.models["small"]
        self.seconds = dict.fromkeys(("small", "base", "judge"), 0.0)
        self.masses: list[float] = []
        self.rows = [self._start(i, p, {name: begins[name][i] for name in begins}) for i, p in enumerate(problems)]

    def _start(self, number: int, problem: Messages, begin: dict[str, str]) -> Solution:
        turn = self.prompts.separator + self.prompts.turn(self.base.tokenizer, problem)
        row = Solution(number, problem, self.prompts.separator, begin, turn)
        row.limit = self._limit(row)
        if row.limit < 1:
            raise InputError(
                f"the problem leaves no room in the context windows ({self.base.window} and {self.small.window} "
                "tokens); shorten it"
            )
        return row

    @property
    def open(self) -> list[Solution]:
        return [row for row in self.rows if row.stop_reason is None]

    def round(self) -> list[Solution]:
        """One more step for every open problem; returns them."""
        start, rows = time.perf_counter(), self.open
        drafts = self._write("small", [row for row in rows if self._drafts(row)])
        scores = self._judge([row for row in rows if row.number in drafts and not row.answering], drafts)
        kept = {n for n in drafts if n not in scores or scores[n].value >= self.reasoner.threshold}
        own = self._write("base", [row for row in rows if row.number not in kept])
        seconds = (time.perf_counter() - start) / len(rows)
        for row in rows:
            self._keep(row, drafts.get(row.number), own.get(row.number), scores.get(row.number), seconds)
        return rows

    def _drafts(self, row: Solution) -> bool:
        """Whether the small model writes first. The one that has ended thinking also writes the answer."""
        if row.answering:
            return row.steps[-1].source == "small"
        return len(row.steps) >= self.reasoner.first_n_base_steps

    def _limit(self, row: Solution) -> int:
        """The most tokens of the next step."""
        text = row.text + row.turn
        room = min(model.room(row.begin[name] + text) for name, model in self.models.items())
        return int(min(self.reasoner.max_step_tokens, self.reasoner.token_budget - row.kept, room))

    def _write(self, name: str, rows: Sequence[Solution]) -> dict[int, Draft]:
        if not rows:
            return {}
        start = time.perf_counter()
        texts = {row.number: row.begin[name] + row.text for row in rows}
        limits = {row.number: row.limit for row in rows}
        drafts = self.models[name].write(texts, limits, self.prompts.separator)
        self.seconds[name] += time.perf_counter() - start
        return drafts

    def _judge(self, rows: Sequence[Solution], drafts: Mapping[int, Draft]) -> dict[int, StepScore]:
        """Scores of the drafts. The base model's own are read off the cache that it writes with."""
        if not rows:
            return {}
        start, scorer = time.perf_counter(), self.reasoner.scorer
        own = isinstance(scorer, DigitScorer) and scorer.model is self.base.model
        if own and scorer.prompts == self.prompts:
            before = list(self.base.fed)
            texts = {row.number: row.begin["base"] + row.text + drafts[row.number].text + row.turn for row in rows}
            logits = self.base.read(texts)
            scores = {row.number: scorer.read(logits[row.number]) for row in rows}
            for row in rows:
                row.judge_tokens += self.base.fed[row.number] - before[row.number]
        else:
            scores = {row.number: scorer.score(row.problem, *row.candidate(drafts[row.number])) for row in rows}
        self.masses += [float(score.probs.sum()) for score in scores.values() if score.probs is not None]
        self.seconds["judge"] += time.perf_counter() - start
        return scores

    def _keep(
        self, row: Solution, draft: Draft | None, own: Draft | None, score: StepScore | None, seconds: float
    ) -> None:
        kept = own or draft
        text, prompts = kept.text, self.prompts
        finished = kept.end == "eos" or any(answer in text for answer in prompts.answers)
        if prompts.answers and not finished:
            text = text.replace(prompts.end_think, "")
        record = StepRecord(
            text,
            "base" if own else "small",
            score,
            draft.text if own and draft else None,
            draft.tokens if draft else 0,
            own.tokens if own else 0,
            seconds,
            kept.end,
        )
        row.steps.append(record)
        row.limit = self._limit(row)
        row.answering = row.answering or (not prompts.answers and prompts.end_think in text)
        row.stop_reason = "finished" if finished else self._why_stop(row)

    def _why_stop(self, row: Solution) -> str | None:
        if len(row.steps) > 2 and row.steps[-1].text == row.steps[-2].text:
            return "repeated"
        if row.kept >= self.reasoner.token_budget:
            return "budget"
        return "context" if row.limit < 1 else None

    def results(self) -> list[ReasoningResult]:
        mass = sum(self.masses) / len(self.masses) if self.masses else math.nan
        if mass < FEW_DIGITS:
            warnings.warn(
                f"the judge gives only {mass:.0%} of the probability to digits; its scores mean little",
                stacklevel=2,
            )
        return [ReasoningResult(row.text, row.steps, row.stop_reason, self._stats(row, mass)) for row in self.rows]

    def _stats(self, row: Solution, mass: float) -> ReasoningStats:
        judged = [step for step in row.steps if step.score is not None]
        share = {name: seconds / len(self.rows) for name, seconds in self.seconds.items()}
        return ReasoningStats(
            small_tokens=sum(step.small_tokens for step in row.steps),
            base_tokens=sum(step.base_tokens for step in row.steps),
            kept_tokens=row.kept,
            judged=len(judged),
            accepted=sum(step.source == "small" for step in judged),
            judge_tokens=row.judge_tokens,
            digit_mass=mass,
            small_seconds=share["small"],
            base_seconds=share["base"],
            judge_seconds=share["judge"],
        )


def check_threshold(threshold: float) -> None:
    if math.isnan(threshold):
        raise InputError("threshold=nan is not allowed; give a score in [0, 9]")
    if not LOWEST <= threshold <= HIGHEST:
        what = "every step is rewritten" if threshold > HIGHEST else "every step is kept"
        warnings.warn(f"threshold={threshold} lies outside the scores of {LOWEST} to {HIGHEST}: {what}", stacklevel=3)
