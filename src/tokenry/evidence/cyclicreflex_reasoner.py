"""Does a reasoning model solve more problems with the wave, and more than with rules that spend as many tokens?

The reasoner of the zoo writes `wait` after a step and does it again, or `check` at the end and begins all over. The
wave and the constant biases that it must beat are chosen on dev problems: all of them are tried once, and the best ones
again with more problems and seeds, so that it is not chance that chooses. What is reported comes from test problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, product
from typing import Any, NamedTuple, cast

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessor

from ..core.errors import InputError
from ..data.problems import Arithmetic, Problem, Split, by_difficulty, draw_problems
from ..decode.budget_forcing import BudgetForcing
from ..decode.cyclicreflex import CyclicReflectionLogitsProcessor, CyclicReflex, constant_schedule
from ..decode.reasoning.reflection import reflection_token_ids
from ..decode.tip import ThoughtSwitchPenalty
from ..measure.claims import Check, Contrast, Finding, above, all_of, at_most, loses_at_most
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import paired_bootstrap
from ..measure.task import Arm, Task
from ..measure.tasks.reasoning import END_THINK, ReasoningTask
from ..zoo.reasoner import LEVELS

__all__ = ["build"]

NAME = "cyclicreflex-reasoner"
PLAIN, TIP, FORCING, SHIFTED, METHOD = "plain", "tip", "budget forcing", "wave, half a period later", "cyclicreflex"
WORD_SETS = (("wait",), ("wait", "check"))  # `check` comes only at the end of what the model has learned from
GRID = {"amplitude": (1.0, 3.0), "period": (24.0, 48.0, 96.0), "shift": (0.0, 0.5)}
CONSTANTS = (-3.0, -1.0, 1.0, 3.0)
MAX_NEW_TOKENS, BUDGETS = 256, (64, 128)
BATCH = 120
FIRST, AGAIN = (120, (0,)), (180, (1, 2, 3))  # dev problems and seeds of the first round, and of the second
KEPT = {"constants": 2, "waves": 4, "forced": 2}  # how many of each are tried again
LONGER, LOST = 1.15, 0.02  # "about the same length": at most this many times the tokens; accuracy that may be lost


@experiment(NAME, CyclicReflex, model="zoo/reasoner", samples=320, seeds=(0, 1, 2), batch=BATCH, quick=3, limit=960)
def build(run: Run[CyclicReflex]) -> Design:
    """Choose the wave and the constants on dev problems, no more of them than test problems, then compare on test
    problems. What `method` sets is not chosen but taken.
    """
    check_tokenizer(run.tokenizer)
    words = {"words", "leading_space", "token_ids"}
    given = {name: value for name, value in run.given.items() if name not in words}
    sets = token_sets(run.tokenizer, run.method)
    counted = sorted({token for ids in sets.values() for token in ids})

    def task(count: int, split: Split) -> ReasoningTask:
        problems = level_by_level(draw_problems(Arithmetic(), min(count, run.count), 0, split, LEVELS))
        return ReasoningTask(run.model, run.tokenizer, Arithmetic(), problems, counted, MAX_NEW_TOKENS, BUDGETS)

    first, again = (Round(task(count, "dev"), seeds[: len(run.seeds)]) for count, seeds in (FIRST, AGAIN))
    test = task(run.count, "test")
    choice = choose(first, again, sets, given)
    return Design(
        task=cast(Task, test),  # its metrics are those of its budgets
        arms=make_arms(choice, sets, given, test),
        baseline=PLAIN,
        facts={"choice": choice},
        notes="Periods fit these short solutions; the paper's is 600 tokens, for thousands.",
        tried=f"Accuracy ± standard error (tokens) on {first}: {choice.first}. The best ones again, on "
        f"{again}: {choice.again}.",
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that does not think in the words of the reasoner."""
    missing = sorted({*chain(*WORD_SETS), END_THINK} - tokenizer.get_vocab().keys())
    if missing:
        raise InputError(f"this model has no token {missing[0]!r}; {NAME} needs --model zoo/reasoner")


def token_sets(tokenizer: PreTrainedTokenizerBase, method: CyclicReflex | None) -> dict[str, tuple[int, ...]]:
    """The reflection tokens to try, by their words: those that the method sets, or those of the reasoner."""
    if method is None or not {"words", "token_ids"} & method.model_fields_set:
        return {
            " ".join(words): tuple(cast(list[int], tokenizer.convert_tokens_to_ids(list(words)))) for words in WORD_SETS
        }
    ids = method.token_ids or reflection_token_ids(tokenizer, method.words, method.leading_space)
    return {" ".join(tokenizer.convert_ids_to_tokens(list(ids))): tuple(ids)}


def level_by_level(problems: Sequence[Problem]) -> list[Problem]:
    """The easiest first: solutions of a batch then end at about the same time."""
    return sorted(problems, key=lambda problem: problem.difficulty)


# --- what is chosen on dev -----------------------------------------------------------------------------------------


class Round(NamedTuple):
    """What settings are tried on: problems, and seeds for each of them."""

    task: ReasoningTask
    seeds: Sequence[int]

    def __str__(self) -> str:
        return f"{len(self.task.problems)} dev problems, seeds {', '.join(map(str, self.seeds))}"

    def trial(self, apply: Mapping[str, Any] | None = None) -> Trial:
        """What an arm does on all problems."""
        problems, solved = self.task.problems, []
        for seed, start in product(self.seeds, range(0, len(problems), BATCH)):
            batch = problems[start : start + BATCH]
            solved += self.task.solved(batch, self.task.generate(batch, 100_000 * seed + start, apply))
        right = np.reshape([one.right for one in solved], (len(self.seeds), len(problems))).mean(0)
        error = float(right.std() / np.sqrt(len(right)))
        return Trial(float(right.mean()), float(np.mean([one.tokens for one in solved])), error)


class Trial(NamedTuple):
    """A setting on dev problems: share solved, mean tokens, and the standard error of the share."""

    accuracy: float
    tokens: float
    error: float = 0.0

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} ± {self.error:.3f} ({self.tokens:.0f})"


Constant = tuple[str, float]  # words, bias
Wave = tuple[str, float, float, float]  # words, amplitude, period, shift


class Trials(NamedTuple):
    """Those of a round: plain sampling, constants, waves, and words for budget forcing."""

    plain: Trial
    constants: dict[Constant, Trial]
    waves: dict[Wave, Trial]
    forced: dict[str, Trial]

    def __str__(self) -> str:
        waves = ", ".join(f"{words} {a:g}/{c:g}/{s:g} {trial}" for (words, a, c, s), trial in self.waves.items())
        constants = ", ".join(f"{words} {bias:+g} {trial}" for (words, bias), trial in self.constants.items())
        forced = ", ".join(f"{word} {trial}" for word, trial in self.forced.items())
        return (
            f"plain sampling {self.plain}; waves, words amplitude/period/shift: {waves}; constants: {constants}; words "
            f"for budget forcing: {forced}"
        )


class Choice(NamedTuple):
    """Both rounds. The second one decides."""

    first: Trials
    again: Trials

    @property
    def wave(self) -> Wave:
        return best(self.again.waves)[0]

    @property
    def constant(self) -> Constant:
        return best(self.again.constants)[0]

    @property
    def word(self) -> str:
        return best(self.again.forced)[0]

    @property
    def equal_constant(self) -> Constant:
        """The constant that spends as many tokens as the wave on its words, read off a line through the trials of the
        first round."""
        words = self.wave[0]
        same = [(trial.tokens, bias) for (its, bias), trial in self.first.constants.items() if its == words]
        tokens, biases = zip(*sorted([*same, (self.first.plain.tokens, 0.0)]))
        return words, round(float(np.interp(self.first.waves[self.wave].tokens, tokens, biases)), 2)


def best(trials: Mapping[Any, Trial], count: int = 1) -> list[Any]:
    """The settings that solve most; of equals, those that need fewest tokens."""
    return sorted(trials, key=lambda setting: (-trials[setting].accuracy, trials[setting].tokens))[:count]


def choose(first: Round, again: Round, sets: Mapping[str, Sequence[int]], given: Mapping[str, Any]) -> Choice:
    """Try every setting in the first round and the best ones in the second. What `given` sets is fixed."""
    axes = [(given[name],) if name in given else values for name, values in GRID.items()]
    applied = {
        "constants": {point: {"processors": [constant(point, sets, first.task)]} for point in product(sets, CONSTANTS)},
        "waves": {point: {"methods": [wave(cast(Wave, point), sets, given)]} for point in product(sets, *axes)},
        "forced": {word: {"methods": [forcing(word)]} for word in WORD_SETS[-1]},
    }

    def attempt(stage: Round, points: Mapping[str, Sequence[Any]]) -> Trials:
        named = [(kind, point) for kind in applied for point in points[kind]]
        found = {key: stage.trial(applied[key[0]][key[1]]) for key in tqdm(named, desc=f"choosing on {stage}")}
        return Trials(stage.trial(), *({point: found[kind, point] for point in points[kind]} for kind in applied))

    tried = attempt(first, {kind: list(points) for kind, points in applied.items()})
    return Choice(tried, attempt(again, {kind: best(getattr(tried, kind), KEPT[kind]) for kind in applied}))


def wave(point: Wave, sets: Mapping[str, Sequence[int]], given: Mapping[str, Any]) -> CyclicReflex:
    return CyclicReflex(**{**given, "token_ids": sets[point[0]], **dict(zip(GRID, point[1:]))})


def constant(point: Constant, sets: Mapping[str, Sequence[int]], task: ReasoningTask) -> LogitsProcessor:
    words, bias = point
    schedule = constant_schedule(bias)
    return CyclicReflectionLogitsProcessor(sets[words], end_think_ids=task.end_ids, schedule=schedule)


def forcing(word: str) -> BudgetForcing:
    """The end of thinking is ignored once, and this word stands in its place."""
    return BudgetForcing(min_ignores=1, ignore_text=word)


# --- the arms --------------------------------------------------------------------------------------------------------


def make_arms(
    choice: Choice, sets: Mapping[str, Sequence[int]], given: Mapping[str, Any], task: ReasoningTask
) -> list[Arm]:
    """Plain sampling, constants, TIP, budget forcing, the wave half a period later, and the wave."""
    method, words = wave(choice.wave, sets, given), choice.wave[0]
    shifted = CyclicReflex(**{**dict(method), "shift": (method.shift + 0.5) % 1})
    shared = {name: getattr(method, name) for name in ("token_ids", "end_think")}
    tip = ThoughtSwitchPenalty(**shared, beta=method.period)  # in the papers too beta is the period: both are 600
    ends = ((words, -method.amplitude), (words, method.amplitude))
    constants = [c for c in dict.fromkeys((*ends, choice.constant, choice.equal_constant)) if c[1]]
    return [
        Arm(PLAIN, role="plain"),
        *(
            Arm(
                constant_name(point),
                role="control",
                setting={"bias": point[1], "token_ids": list(sets[point[0]])},
                apply={"processors": [constant(point, sets, task)]},
            )
            for point in constants
        ),
        Arm(TIP, tip, "control"),
        Arm(FORCING, forcing(choice.word), "control"),
        Arm(SHIFTED, shifted, "control"),
        Arm(METHOD, method),
    ]


def constant_name(point: Constant) -> str:
    words, bias = point
    return f"constant {bias:+g} on {words}" if bias else PLAIN


# --- afterwards ----------------------------------------------------------------------------------------------------


@build.findings
def findings(c: Comparison, choice: Choice) -> list[Finding]:
    """Accuracy and length against plain, then against every rule that could do the same, then budget by budget and
    level by level."""
    spent = "; ".join(
        f"{name} {c.mean(name, 'accuracy'):.3f} with {c.mean(name, 'tokens'):.1f} tokens" for name in c.arms
    )
    constants = dict.fromkeys((constant_name(choice.constant), constant_name(choice.equal_constant)))
    return [
        Finding(
            "it solves more problems than plain sampling",
            above(c.gap("accuracy", METHOD, PLAIN), 0),
            main=True,
            note=spent,
        ),
        Finding("at about the same length as plain sampling", at_most(c.ratio("tokens", METHOD, PLAIN), LONGER)),
        Finding(
            "it solves more than the best constant of dev, and than a constant that spends as many tokens",
            beats(c, "accuracy", METHOD, list(constants)),
        ),
        Finding("it is the wave: half a period later it solves less", beats(c, "accuracy", METHOD, [SHIFTED])),
        Finding("it solves more than TIP and than budget forcing", beats(c, "accuracy", METHOD, [TIP, FORCING])),
        Finding(
            f"cut off at {' or '.join(map(str, BUDGETS))} tokens, it still solves more than plain sampling",
            all_of(*(above(c.gap(f"accuracy_{n}", METHOD, PLAIN), 0) for n in BUDGETS)),
        ),
        Finding("on no level does it lose", all_of(*_by_level(c))),
    ]


def _by_level(c: Comparison) -> list[Check]:
    """The gain of each level, with its interval over the problems of the level."""
    method, plain = (c.values(name, "accuracy") for name in (METHOD, PLAIN))
    levels = by_difficulty(cast(ReasoningTask, c.experiment.task).problems)
    gains = {level: paired_bootstrap(method[i], plain[i]) for level, i in levels.items()}
    return [loses_at_most(Contrast(gain, f"level {level}", "+.3f"), LOST) for level, gain in gains.items()]
