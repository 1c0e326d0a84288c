"""Does the probability of the answer tell right from wrong, and more than what everybody has at hand?

The model judges solutions that it drew itself. Half of them are a bare equation, whose tokens but the answer are nearly
certain; the other half begin with words of the model's choice, whose probability has nothing to do with the sum.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..judge.answers.samples import Solution
from ..judge.crew import CRew
from ..measure.compare import Comparison
from ..measure.statistics import Interval, bootstrap_statistic
from ..measure.task import Experiment, Finding, Subject
from ..measure.tasks.arithmetic import KINDS, ArithmeticTask, auroc

PLAIN, LENGTH, RANDOM, ALIKE = "mean log-likelihood", "shortest", "random", "all alike"
METHOD, GEOMETRIC, LEAST = "crew", "crew, geo_mean", "crew, min"
EQUATION, WORDS = KINDS


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    method: CRew | None = None,
) -> Experiment:
    """Judges of the same 8 solutions to each sum: log-likelihood, length, chance, none, and CRew.

    Args:
        method: settings to compare as well; where it sets no marker, the answer is the last number.
    """
    subjects = [
        Subject(PLAIN, "plain", {}, likelihood),
        Subject(LENGTH, "control", {}, shortest),
        Subject(RANDOM, "control", {}, chance),
        Subject(ALIKE, "control", {}, alike),
        *(
            _subject(name, CRew(marker="number", aggregate=aggregate))
            for name, aggregate in ((METHOD, "mean_prob"), (GEOMETRIC, "geo_mean"), (LEAST, "min"))
        ),
    ]
    if method is not None:
        subjects.append(_subject("as given", CRew(**{"marker": "number", **method.model_dump(exclude_unset=True)})))
    return Experiment(
        slug=CRew.slug,
        claim=CRew.claim,
        task=ArithmeticTask(model, tokenizer, samples or 200),
        subjects=subjects,
        baseline=PLAIN,
        judge=judge,
        seeds=tuple(seeds or (0,)),
        batch=16,
        notes="`all alike` gives every solution the same score: its vote is the plain vote, its best the first one. "
        "Half of the questions are answered by a bare equation, half with a few free words before it. The solutions "
        "are short; the paper's are long. The free words were settled on after 14 other prompts had been tried at 96 "
        "solutions each; in several of them the log-likelihood ties or wins.",
    )


def _subject(name: str, method: CRew) -> Subject:
    def score(solutions: Sequence[Solution], draw: random.Random) -> list[float | None]:
        return method.score(solutions)

    marker = getattr(method.marker, "__name__", method.marker)
    return Subject(name, "method", {"aggregate": method.aggregate, "marker": marker}, score)


def likelihood(solutions: Sequence[Solution], draw: random.Random) -> list[float]:
    """The geometric mean of all probabilities, which orders solutions as the mean log-likelihood does."""
    return [float(solution.logprob.mean().exp()) for solution in solutions]


def shortest(solutions: Sequence[Solution], draw: random.Random) -> list[float]:
    return [1 / (1 + len(solution.logprob)) for solution in solutions]


def chance(solutions: Sequence[Solution], draw: random.Random) -> list[float]:
    return [draw.random() for _ in solutions]


def alike(solutions: Sequence[Solution], draw: random.Random) -> list[float]:
    return [1.0] * len(solutions)


def judge(comparison: Comparison) -> list[Finding]:
    """Right against wrong, against likelihood, against the controls; votes, best of n, calibration."""
    return [
        _tells(comparison),
        _beats_likelihood(comparison),
        _beats_controls(comparison),
        _votes(comparison),
        _chooses(comparison),
        _is_calibrated(comparison),
    ]


Scored = list[np.ndarray]  # of each question (n, 2): score, and 1 if right


def scored(comparison: Comparison, subject: str, kind: str | None = None) -> Scored:
    """Every judged solution of each question, seeds together, of one kind or all."""
    details = comparison.details(subject)
    questions = [details[i :: len(comparison.samples)] for i in range(len(comparison.samples))]
    return [
        np.array([row for d in question for row in d["scored"]], float).reshape(-1, 2)
        for question in questions
        if kind in (None, question[0]["kind"])
    ]


def over(first: Scored, second: Scored | None = None) -> Interval:
    """AUROC over all solutions, or how much higher the first is, with its interval over questions."""

    def compute(pick: np.ndarray) -> float:
        return _pooled(first, pick) - (_pooled(second, pick) if second else 0.0)

    return bootstrap_statistic(compute, len(first))


def _pooled(questions: Scored, pick: np.ndarray) -> float:
    rows = np.concatenate([questions[i] for i in pick])
    return auroc(rows[:, 0], rows[:, 1])


def _gain(comparison: Comparison, subject: str, kind: str) -> Interval:
    return over(scored(comparison, METHOD, kind), scored(comparison, subject, kind))


def _tells(comparison: Comparison) -> Finding:
    found = {kind: over(scored(comparison, METHOD, kind)) for kind in KINDS}
    return Finding(
        "The probability of the answer tells right from wrong: AUROC above 0.70 for both kinds of solution.",
        all(interval.mean > 0.70 for interval in found.values()),
        "AUROC: " + ", ".join(f"{kind} {_show(interval)}" for kind, interval in found.items()),
    )


def _beats_likelihood(comparison: Comparison) -> Finding:
    gain = {kind: _gain(comparison, PLAIN, kind) for kind in KINDS}
    notes = {kind: "" if interval.excludes_zero else " (a tie)" for kind, interval in gain.items()}
    return Finding(
        "Where the words are free it tells more than the mean log-likelihood of the solution.",
        gain[WORDS].low > 0,
        "AUROC, crew - mean log-likelihood: "
        + ", ".join(f"{kind} {_show(interval, signed=True)}{notes[kind]}" for kind, interval in gain.items()),
    )


def _beats_controls(comparison: Comparison) -> Finding:
    gain = {(name, kind): _gain(comparison, name, kind) for name in (LENGTH, RANDOM) for kind in KINDS}
    return Finding(
        "It tells more than the length of the solution and than chance.",
        all(interval.low > 0 for interval in gain.values()),
        "AUROC, crew - control: "
        + ", ".join(f"{name}, {kind} {_show(interval, signed=True)}" for (name, kind), interval in gain.items()),
    )


def _votes(comparison: Comparison) -> Finding:
    gain = comparison.difference(METHOD, ALIKE, "vote")
    rates = {name: comparison.mean(name, "vote") for name in (METHOD, ALIKE, PLAIN)}
    return Finding(
        "A vote weighted by it is right at least as often as a plain vote.",
        gain.mean >= 0,
        f"right votes: crew {rates[METHOD]:.3f}, plain vote {rates[ALIKE]:.3f}, weighted by likelihood "
        f"{rates[PLAIN]:.3f}; crew - plain vote {_show(gain, signed=True)}",
    )


def _chooses(comparison: Comparison) -> Finding:
    gain = comparison.difference(METHOD, ALIKE, "best_of_n")
    rates = {name: comparison.mean(name, "best_of_n") for name in (METHOD, ALIKE)}
    other = comparison.difference(METHOD, PLAIN, "best_of_n")
    return Finding(
        "The best of 8 by it is right more often than one solution.",
        gain.low > 0,
        f"right: crew {rates[METHOD]:.3f}, one solution {rates[ALIKE]:.3f}; crew - one {_show(gain, signed=True)}; "
        f"crew - mean log-likelihood {_show(other, signed=True)}",
    )


def _is_calibrated(comparison: Comparison) -> Finding:
    rows = np.concatenate(scored(comparison, METHOD))
    fifths = [part.mean(0) for part in np.array_split(rows[rows[:, 0].argsort(kind="stable")], 5) if len(part)]
    return Finding(
        "The higher the probability, the more solutions are right: the highest fifth beats the lowest.",
        bool(fifths[-1][1] > fifths[0][1]),
        "mean probability and share of right, by fifths: " + ", ".join(f"{p:.2f}: {right:.2f}" for p, right in fifths),
    )


def _show(interval: Interval, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{interval.mean:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
