"""Does a reasoning model solve more problems with the wave, and more than with rules that spend as many tokens?

The reasoner of the zoo writes `wait` after a step and does it again, or `check` at the end and begins all over. The
wave and the constant biases that it must beat are chosen on dev problems; what is reported comes from test problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...decode.budget_forcing import BudgetForcing
from ...decode.cyclicreflex import CyclicReflectionLogitsProcessor, CyclicReflex, constant_schedule
from ...decode.thinking import reflection_token_ids
from ...decode.tip import ThoughtSwitchPenalty
from ...errors import InputError
from ...problems import Arithmetic, Problem, by_difficulty, draw_problems
from ...zoo.reasoner import LEVELS
from ..compare import Comparison
from ..reasoning import END_THINK, ReasoningTask
from ..statistics import Interval, bootstrap_statistic, paired_bootstrap
from ..task import Experiment, Finding, Subject

__all__ = ["build"]

NAME = "cyclicreflex-reasoner"
PLAIN, TIP, FORCING, SHIFTED, METHOD = "plain", "tip", "budget forcing", "wave, half a period later", "cyclicreflex"
WORDS = {"words": ("wait", "check"), "leading_space": False}
GRID = {"amplitude": (1.5, 3.0), "period": (20.0, 40.0, 80.0, 160.0), "shift": (0.0, 0.5)}
CONSTANTS = (-3.0, -1.5, 0.0, 1.5, 3.0)
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
        method: amplitude, period, shift and words that it sets are not chosen but taken.
    """
    check_tokenizer(tokenizer)
    given = {**WORDS, **({name: getattr(method, name) for name in method.model_fields_set} if method else {})}
    token_ids = CyclicReflex(**given).token_ids or reflection_token_ids(
        tokenizer, given["words"], given["leading_space"]
    )
    count, arithmetic = samples or 320, Arithmetic()
    dev, test = (
        ReasoningTask(model, tokenizer, arithmetic, level_by_level(problems), token_ids, MAX_NEW_TOKENS, BUDGETS)
        for problems in (
            draw_problems(arithmetic, min(count, DEV_PROBLEMS), split="dev", levels=LEVELS),
            draw_problems(arithmetic, count, levels=LEVELS),
        )
    )
    choice = choose(dev, token_ids, given)
    return Experiment(
        slug=NAME,
        claim=CyclicReflex.claim,
        task=test,
        subjects=make_subjects(choice, token_ids, given, test),
        baseline=PLAIN,
        judge=partial(judge, choice=choice),
        seeds=tuple(seeds or (0, 1, 2)),
        batch=BATCH,
        notes=choice.notes(len(dev.problems)),
    )


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model that does not think in the words of the reasoner."""
    missing = sorted({*WORDS["words"], END_THINK} - tokenizer.get_vocab().keys())
    if missing:
        raise InputError(f"this model has no token {missing[0]!r}; {NAME} needs --model zoo/reasoner")


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


class Choice(NamedTuple):
    """Trials of constants by bias and of waves by (amplitude, period, shift), and of words for budget forcing."""

    constants: dict[float, Trial]
    waves: dict[tuple[float, float, float], Trial]
    words: dict[str, Trial]

    @property
    def wave(self) -> dict[str, float]:
        return dict(zip(GRID, best(self.waves)))

    @property
    def word(self) -> str:
        return best(self.words)

    @property
    def constant(self) -> float:
        """The best constant other than none."""
        return best({bias: trial for bias, trial in self.constants.items() if bias})

    @property
    def equal_constant(self) -> float:
        """The constant that spends as many tokens as the wave, read off a line through the trials."""
        points = sorted((trial.tokens, bias) for bias, trial in self.constants.items())
        tokens, biases = zip(*points)
        return round(float(np.interp(self.waves[best(self.waves)].tokens, tokens, biases)), 2)

    def notes(self, problems: int) -> str:
        """The grid with what it gave."""
        waves = ", ".join(f"{a:g}/{c:g}/{s:g} {trial}" for (a, c, s), trial in self.waves.items())
        constants = ", ".join(f"{bias:+g} {trial}" for bias, trial in self.constants.items())
        words = ", ".join(f"{word} {trial}" for word, trial in self.words.items())
        return (
            f"Chosen by accuracy on {problems} dev problems, one seed. Accuracy (tokens) of waves, "
            f"amplitude/period/shift: {waves}. Of constants: {constants}. Of words for budget forcing: {words}. "
            "Periods fit these short solutions; the paper's is 600 tokens, for solutions of thousands."
        )


def best(trials: Mapping[Any, Trial]) -> Any:
    """The setting that solves most; of equals, the one that needs fewest tokens."""
    return max(trials, key=lambda setting: (trials[setting].accuracy, -trials[setting].tokens))


def choose(dev: ReasoningTask, token_ids: Sequence[int], given: Mapping[str, Any]) -> Choice:
    """Try every setting on the dev problems. What `given` sets is fixed."""
    axes = [(given[name],) if name in given else values for name, values in GRID.items()]
    waves = {point: CyclicReflex(**{**given, **dict(zip(GRID, point))}) for point in product(*axes)}
    words = {word: forcing(word) for word in WORDS["words"]}
    with tqdm(desc="choosing on dev", total=len(CONSTANTS) + len(waves) + len(words)) as bar:

        def attempt(apply: dict[str, Any]) -> Trial:
            solved = []
            for start in range(0, len(dev.problems), BATCH):
                problems = dev.problems[start : start + BATCH]
                solved += dev.solved(problems, dev.generate(problems, start, apply))
            bar.update()
            return Trial(float(np.mean([s.right for s in solved])), float(np.mean([s.tokens for s in solved])))

        return Choice(
            {bias: attempt({"processors": [constant(bias, token_ids, dev)]}) for bias in CONSTANTS},
            {point: attempt({"methods": [wave]}) for point, wave in waves.items()},
            {word: attempt({"methods": [rule]}) for word, rule in words.items()},
        )


def constant(bias: float, token_ids: Sequence[int], task: ReasoningTask) -> CyclicReflectionLogitsProcessor:
    return CyclicReflectionLogitsProcessor(token_ids, end_think_ids=task.end_ids, schedule=constant_schedule(bias))


def forcing(word: str) -> BudgetForcing:
    """The end of thinking is ignored once, and this word stands in its place."""
    return BudgetForcing(min_ignores=1, ignore_text=word)


# --- the subjects ----------------------------------------------------------------------------------------------------


def make_subjects(
    choice: Choice, token_ids: Sequence[int], given: Mapping[str, Any], task: ReasoningTask
) -> list[Subject]:
    """Plain sampling, constants, TIP, budget forcing, the wave half a period later, and the wave."""
    method = CyclicReflex(**{**given, **choice.wave})
    shifted = CyclicReflex(**{**dict(method), "shift": (method.shift + 0.5) % 1})
    shared = {name: getattr(method, name) for name in ("words", "leading_space", "token_ids", "end_think")}
    tip = ThoughtSwitchPenalty(**shared, beta=method.period)  # in the papers too beta is the period: both are 600
    rules = {TIP: tip, FORCING: forcing(choice.word), SHIFTED: shifted, METHOD: method}
    biases = dict.fromkeys((-method.amplitude, method.amplitude, choice.constant, choice.equal_constant))
    constants = {bias: constant(bias, token_ids, task) for bias in biases if bias}
    return [
        Subject(PLAIN, "plain"),
        *(
            Subject(constant_name(b), "control", {"bias": b, "token_ids": list(token_ids)}, {"processors": [rule]})
            for b, rule in constants.items()
        ),
        *(
            Subject(name, "method" if name == METHOD else "control", rule.model_dump(mode="json"), {"methods": [rule]})
            for name, rule in rules.items()
        ),
    ]


def constant_name(bias: float) -> str:
    return f"constant {bias:+g}" if bias else PLAIN


# --- afterwards ----------------------------------------------------------------------------------------------------


def judge(comparison: Comparison, choice: Choice) -> list[Finding]:
    """Accuracy and length against plain, then against every rule that could do the same, then budget by budget and
    level by level."""
    gain, length = comparison.difference(METHOD, PLAIN, "accuracy"), longer(comparison, METHOD, PLAIN)
    return [
        Finding(
            "it solves more problems than plain sampling",
            gain.low > 0,
            f"accuracy: {_signed(gain)}; cyclicreflex {_spent(comparison, METHOD)}, plain {_spent(comparison, PLAIN)}",
        ),
        Finding(
            f"at about the same length: at most {LONGER} times the tokens of plain sampling",
            length.mean <= LONGER,
            f"tokens, times plain: {length.mean:.2f} [{length.low:.2f}, {length.high:.2f}]",
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
        f"{name}{f' ({about})' if about else ''} {_signed(gains[about])}, it has {_spent(comparison, name)}"
        for about, name in controls.items()
    )
    return Finding(
        statement, all(gain.low > 0 for gain in gains.values()), "accuracy, cyclicreflex - " + "; ".join(shown)
    )


def _within_budgets(comparison: Comparison) -> Finding:
    gains = {n: comparison.difference(METHOD, PLAIN, f"accuracy_{n}") for n in BUDGETS}
    shown = ", ".join(
        f"{n} tokens {_signed(gain)} ("
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
            f"{level}: {_signed(gain)} of {solved[PLAIN][levels[level]].mean():.3f}" for level, gain in gains.items()
        ),
    )


def _spent(comparison: Comparison, subject: str) -> str:
    return f"{comparison.mean(subject, 'accuracy'):.3f} with {comparison.mean(subject, 'tokens'):.1f} tokens"


def _signed(interval: Interval) -> str:
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
