"""Does a reasoning model solve more problems with the wave, and more than with rules that spend as many tokens?

The reasoner of the zoo writes `wait` after a step and does it again, or `check` at the end and begins all over. The
wave and the constant biases that it must beat are chosen on dev problems; what is reported comes from test problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain, product
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessor

from ..core.errors import InputError
from ..data.problems import Arithmetic, Problem, by_difficulty, draw_problems
from ..decode.budget_forcing import BudgetForcing
from ..decode.cyclicreflex import CyclicReflectionLogitsProcessor, CyclicReflex, constant_schedule
from ..decode.reasoning.reflection import reflection_token_ids
from ..decode.tip import ThoughtSwitchPenalty
from ..measure.compare import Comparison
from ..measure.statistics import Interval, bootstrap_statistic, paired_bootstrap
from ..measure.task import Experiment, Finding, Subject
from ..measure.tasks.reasoning import END_THINK, ReasoningTask
from ..zoo.reasoner import LEVELS

__all__ = ["build"]

NAME = "cyclicreflex-reasoner"
PLAIN, TIP, FORCING, SHIFTED, METHOD = "plain", "tip", "budget forcing", "wave, half a period later", "cyclicreflex"
WORD_SETS = (("wait",), ("wait", "check"))  # `check` comes only at the end of what the model has learned from
GRID = {"amplitude": (1.0, 3.0), "period": (24.0, 48.0, 96.0), "shift": (0.0, 0.5)}
CONSTANTS = (-3.0, -1.0, 1.0, 3.0)
MAX_NEW_TOKENS, BUDGETS = 256, (64, 128)
DEV_PROBLEMS, BATCH = 120, 40
LONGER = 1.15  # "about the same length": at most this many times the tokens


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    method: CyclicReflex | None = None,
) -> Experiment:
    """Choose the wave and the constants on dev problems, then compare on test problems.

    Args:
        samples: test problems; default 320. No more than that many dev problems are used.
        method: what it sets is not chosen but taken.
    """
    check_tokenizer(tokenizer)
    words = {"words", "leading_space", "token_ids"}
    given = {name: getattr(method, name) for name in method.model_fields_set - words} if method else {}
    sets = token_sets(tokenizer, method)
    counted = sorted({token for ids in sets.values() for token in ids})
    count, arithmetic = samples or 320, Arithmetic()
    dev, test = (
        ReasoningTask(model, tokenizer, arithmetic, level_by_level(problems), counted, MAX_NEW_TOKENS, BUDGETS)
        for problems in (
            draw_problems(arithmetic, min(count, DEV_PROBLEMS), split="dev", levels=LEVELS),
            draw_problems(arithmetic, count, levels=LEVELS),
        )
    )
    choice = choose(dev, sets, given)
    return Experiment(
        slug=NAME,
        claim=CyclicReflex.claim,
        task=test,
        subjects=make_subjects(choice, sets, given, test),
        baseline=PLAIN,
        judge=partial(judge, choice=choice),
        seeds=tuple(seeds or (0, 1, 2)),
        batch=BATCH,
        notes=choice.notes(len(dev.problems)),
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that does not think in the words of the reasoner."""
    missing = sorted({*chain(*WORD_SETS), END_THINK} - tokenizer.get_vocab().keys())
    if missing:
        raise InputError(f"this model has no token {missing[0]!r}; {NAME} needs --model zoo/reasoner")


def token_sets(tokenizer: PreTrainedTokenizerBase, method: CyclicReflex | None) -> dict[str, tuple[int, ...]]:
    """The reflection tokens to try, by their words: those that the method sets, or those of the reasoner."""
    if method is None or not {"words", "token_ids"} & method.model_fields_set:
        return {" ".join(words): tuple(tokenizer.convert_tokens_to_ids(words)) for words in WORD_SETS}
    ids = method.token_ids or reflection_token_ids(tokenizer, method.words, method.leading_space)
    return {" ".join(tokenizer.convert_ids_to_tokens(ids)): tuple(ids)}


def level_by_level(problems: Sequence[Problem]) -> list[Problem]:
    """The easiest first: solutions of a batch then end at about the same time."""
    return sorted(problems, key=lambda problem: problem.difficulty)


# --- what is chosen on dev -----------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """A setting on the dev problems: share solved, mean tokens."""

    accuracy: float
    tokens: float

    def __str__(self) -> str:
        return f"{self.accuracy:.3f} ({self.tokens:.0f})"


Constant = tuple[str, float]  # words, bias
Wave = tuple[str, float, float, float]  # words, amplitude, period, shift


class Choice(NamedTuple):
    """Trials of plain sampling, of constants, of waves, and of words for budget forcing."""

    plain: Trial
    constants: dict[Constant, Trial]
    waves: dict[Wave, Trial]
    forced: dict[str, Trial]

    @property
    def wave(self) -> Wave:
        return best(self.waves)

    @property
    def constant(self) -> Constant:
        return best(self.constants)

    @property
    def word(self) -> str:
        return best(self.forced)

    @property
    def equal_constant(self) -> Constant:
        """The constant that spends as many tokens as the wave on its words, read off a line through the trials."""
        words = self.wave[0]
        same = [(trial.tokens, bias) for (its, bias), trial in self.constants.items() if its == words]
        tokens, biases = zip(*sorted([*same, (self.plain.tokens, 0.0)]))
        return words, round(float(np.interp(self.waves[self.wave].tokens, tokens, biases)), 2)

    def notes(self, problems: int) -> str:
        """The grid with what it gave."""
        waves = ", ".join(f"{words} {a:g}/{c:g}/{s:g} {trial}" for (words, a, c, s), trial in self.waves.items())
        constants = ", ".join(f"{words} {bias:+g} {trial}" for (words, bias), trial in self.constants.items())
        forced = ", ".join(f"{word} {trial}" for word, trial in self.forced.items())
        return (
            f"Chosen by accuracy on {problems} dev problems, one seed. Accuracy (tokens) of plain sampling: "
            f"{self.plain}. Of waves, words amplitude/period/shift: {waves}. Of constants: {constants}. Of words for "
            f"budget forcing: {forced}. Periods fit these short solutions; the paper's is 600 tokens, for thousands."
        )


def best(trials: Mapping[Any, Trial]) -> Any:
    """The setting that solves most; of equals, the one that needs fewest tokens."""
    return max(trials, key=lambda setting: (trials[setting].accuracy, -trials[setting].tokens))


def choose(dev: ReasoningTask, sets: Mapping[str, Sequence[int]], given: Mapping[str, Any]) -> Choice:
    """Try every setting on the dev problems. What `given` sets is fixed."""
    axes = [(given[name],) if name in given else values for name, values in GRID.items()]
    waves = {point: {"methods": [wave(point, sets, given)]} for point in product(sets, *axes)}
    constants = {point: {"processors": [constant(point, sets, dev)]} for point in product(sets, CONSTANTS)}
    forced = {word: {"methods": [forcing(word)]} for word in WORD_SETS[-1]}
    with tqdm(desc="choosing on dev", total=1 + len(waves) + len(constants) + len(forced)) as bar:

        def attempt(apply: dict[str, Any] | None = None) -> Trial:
            bar.update()
            return trial(dev, apply)

        def attempts(applied: dict[Any, dict[str, Any]]) -> dict[Any, Trial]:
            return {point: attempt(apply) for point, apply in applied.items()}

        return Choice(attempt(), attempts(constants), attempts(waves), attempts(forced))


def trial(task: ReasoningTask, apply: dict[str, Any] | None) -> Trial:
    """What a subject does on all problems of a task, with one seed."""
    solved = []
    for start in range(0, len(task.problems), BATCH):
        problems = task.problems[start : start + BATCH]
        solved += task.solved(problems, task.generate(problems, start, apply))
    return Trial(float(np.mean([s.right for s in solved])), float(np.mean([s.tokens for s in solved])))


def wave(point: Wave, sets: Mapping[str, Sequence[int]], given: Mapping[str, Any]) -> CyclicReflex:
    return CyclicReflex(**{**given, "token_ids": sets[point[0]], **dict(zip(GRID, point[1:]))})


def constant(point: Constant, sets: Mapping[str, Sequence[int]], task: ReasoningTask) -> LogitsProcessor:
    words, bias = point
    schedule = constant_schedule(bias)
    return CyclicReflectionLogitsProcessor(sets[words], end_think_ids=task.end_ids, schedule=schedule)


def forcing(word: str) -> BudgetForcing:
    """The end of thinking is ignored once, and this word stands in its place."""
    return BudgetForcing(min_ignores=1, ignore_text=word)


# --- the subjects ----------------------------------------------------------------------------------------------------


def make_subjects(
    choice: Choice, sets: Mapping[str, Sequence[int]], given: Mapping[str, Any], task: ReasoningTask
) -> list[Subject]:
    """Plain sampling, constants, TIP, budget forcing, the wave half a period later, and the wave."""
    method, words = wave(choice.wave, sets, given), choice.wave[0]
    shifted = CyclicReflex(**{**dict(method), "shift": (method.shift + 0.5) % 1})
    shared = {name: getattr(method, name) for name in ("token_ids", "end_think")}
    tip = ThoughtSwitchPenalty(**shared, beta=method.period)  # in the papers too beta is the period: both are 600
    rules = {TIP: tip, FORCING: forcing(choice.word), SHIFTED: shifted, METHOD: method}
    ends = ((words, -method.amplitude), (words, method.amplitude))
    constants = [c for c in dict.fromkeys((*ends, choice.constant, choice.equal_constant)) if c[1]]
    return [
        Subject(PLAIN, "plain"),
        *(
            Subject(
                constant_name(point),
                "control",
                {"bias": point[1], "token_ids": list(sets[point[0]])},
                {"processors": [constant(point, sets, task)]},
            )
            for point in constants
        ),
        *(
            Subject(name, "method" if name == METHOD else "control", rule.model_dump(mode="json"), {"methods": [rule]})
            for name, rule in rules.items()
        ),
    ]


def constant_name(point: Constant) -> str:
    words, bias = point
    return f"constant {bias:+g} on {words}" if bias else PLAIN


# --- afterwards ----------------------------------------------------------------------------------------------------


def judge(comparison: Comparison, choice: Choice) -> list[Finding]:
    """Accuracy and length against plain, then against every rule that could do the same, then budget by budget and
    level by level."""
    gain, length = comparison.difference(METHOD, PLAIN, "accuracy"), longer(comparison, METHOD, PLAIN)
    return [
        Finding(
            "it solves more problems than plain sampling",
            gain.low > 0,
            f"accuracy: {gain:+.3f}; cyclicreflex {_spent(comparison, METHOD)}, plain {_spent(comparison, PLAIN)}",
        ),
        Finding(
            f"at about the same length: at most {LONGER} times the tokens of plain sampling",
            length.mean <= LONGER,
            f"tokens, times plain: {length:.2f}",
        ),
        _beats(
            comparison,
            "it solves more than the best constant of dev, and than a constant that spends as many tokens",
            {"best of dev": constant_name(choice.constant), "as many tokens": constant_name(choice.equal_constant)},
        ),
        _beats(comparison, "it is the wave: half a period later it solves less", {"": SHIFTED}),
        _beats(comparison, "it solves more than TIP and than budget forcing", {"": TIP, choice.word: FORCING}),
        _within_budgets(comparison),
        _on_levels(comparison),
    ]


def longer(comparison: Comparison, subject: str, than: str) -> Interval:
    """How many times the tokens of `than` a subject needs, over all samples."""
    a, b = comparison.values(subject, "tokens"), comparison.values(than, "tokens")
    return bootstrap_statistic(lambda pick: a[pick].sum() / b[pick].sum(), len(a))


def _beats(comparison: Comparison, statement: str, controls: Mapping[str, str]) -> Finding:
    """Whether accuracy is surely above that of every control; the keys say what a control is."""
    gains = {about: comparison.difference(METHOD, name, "accuracy") for about, name in controls.items()}
    shown = (
        f"{name}{f' ({about})' if about else ''} {gains[about]:+.3f}, it has {_spent(comparison, name)}"
        for about, name in controls.items()
    )
    return Finding(
        statement, all(gain.low > 0 for gain in gains.values()), "accuracy, cyclicreflex - " + "; ".join(shown)
    )


def _within_budgets(comparison: Comparison) -> Finding:
    gains = {n: comparison.difference(METHOD, PLAIN, f"accuracy_{n}") for n in BUDGETS}
    shown = ", ".join(
        f"{n} tokens {gain:+.3f} ("
        + ", ".join(f"{s} {comparison.mean(s, f'accuracy_{n}'):.3f}" for s in comparison.subjects)
        + ")"
        for n, gain in gains.items()
    )
    return Finding(
        f"cut off at {' or '.join(map(str, BUDGETS))} tokens, it still solves more than plain sampling",
        all(gain.low > 0 for gain in gains.values()),
        f"accuracy, cyclicreflex - plain: {shown}",
    )


def _on_levels(comparison: Comparison) -> Finding:
    """The gain of each level, with its interval over the problems of the level."""
    solved = {name: comparison.values(name, "accuracy") for name in (METHOD, PLAIN)}
    levels = by_difficulty(comparison.experiment.task.problems)
    gains = {level: paired_bootstrap(solved[METHOD][i], solved[PLAIN][i]) for level, i in levels.items()}
    return Finding(
        "on no level does it solve less",
        all(gain.high >= 0 for gain in gains.values()),
        "accuracy, cyclicreflex - plain, by level: "
        + ", ".join(
            f"{level}: {gain:+.3f} of {solved[PLAIN][levels[level]].mean():.3f}" for level, gain in gains.items()
        ),
    )


def _spent(comparison: Comparison, subject: str) -> str:
    return f"{comparison.mean(subject, 'accuracy'):.3f} with {comparison.mean(subject, 'tokens'):.1f} tokens"
