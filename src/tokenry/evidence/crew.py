"""Does the probability of the answer tell right from wrong, and more than what everybody has at hand?

The model judges long solutions that it drew itself: every step is written down, and the answer stands at the end.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from ..core.calibration import auroc
from ..data.problems import Arithmetic, draw_problems
from ..judge.answers.samples import Solution
from ..judge.crew import Aggregate, CRew
from ..measure.claims import Contrast, Finding, above, all_of, describe
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import Interval, bootstrap_statistic
from ..measure.task import Arm
from ..measure.tasks.arithmetic import ArithmeticTask
from ..zoo.reasoner import LEVELS

PLAIN, LENGTH, RANDOM, ALIKE = "mean log-likelihood", "shortest", "random", "all alike"
METHOD, GEOMETRIC, LEAST = "crew", "crew, geo_mean", "crew, min"


@experiment(
    "crew",
    CRew,
    model="zoo/reasoner",
    samples=1000,
    batch=16,
    quick=8,
    limit=2000,
    claim="The probability a model gives its own final answer picks right solutions, more often than the likelihood of "
    "the whole solution does.",
)
def build(run: Run[CRew]) -> Design:
    """Judges of the same 8 solutions to each problem: log-likelihood, length, chance, none, and CRew.

    `method` has settings to compare as well; where it sets no marker, the answer is the last number.
    """
    settings: dict[str, Aggregate] = {METHOD: "mean_prob", GEOMETRIC: "geo_mean", LEAST: "min"}
    methods = {name: CRew(marker="number", aggregate=aggregate) for name, aggregate in settings.items()}
    if run.method is not None:
        methods["as given"] = run.settings(CRew, marker="number")
    return Design(
        task=ArithmeticTask(run.model, run.tokenizer, draw_problems(Arithmetic(), run.count, levels=LEVELS)),
        arms=[
            Arm(PLAIN, role="plain", apply=likelihood),
            Arm(LENGTH, role="control", apply=shortest),
            Arm(RANDOM, role="control", apply=chance),
            Arm(ALIKE, role="control", apply=alike),
            *(_arm(name, method) for name, method in methods.items()),
        ],
        baseline=PLAIN,
        notes="`all alike` gives every solution the same score: its vote is the plain vote, its best the first one. "
        "No two problems are the same.",
        tried="Short sums of SmolLM2, asked in 15 ways: the log-likelihood was as good or better in several of them.",
    )


def _arm(name: str, method: CRew) -> Arm:
    def score(solutions: Sequence[Solution], draw: random.Random) -> list[float | None]:
        return method.score(solutions)

    marker = getattr(method.marker, "__name__", method.marker)
    return Arm(name, setting={"aggregate": method.aggregate, "marker": marker}, apply=score)


def likelihood(solutions: Sequence[Solution], draw: random.Random) -> list[float]:
    """The geometric mean of all probabilities, which orders solutions as the mean log-likelihood does."""
    return [float(solution.logprob.mean().exp()) for solution in solutions]


def shortest(solutions: Sequence[Solution], draw: random.Random) -> list[float]:
    return [1 / (1 + len(solution.logprob)) for solution in solutions]


def chance(solutions: Sequence[Solution], draw: random.Random) -> list[float]:
    return [draw.random() for _ in solutions]


def alike(solutions: Sequence[Solution], draw: random.Random) -> list[float]:
    return [1.0] * len(solutions)


Scored = list[np.ndarray]  # of each question (n, 2): score, and 1 if right


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """Use and discernment, each against likelihood and against the controls; votes; calibration."""
    return [
        Finding(
            "The best of 8 by it is right more often than the best by log-likelihood.",
            beats(c, "best_of_n", METHOD, [PLAIN]),
            main=True,
        ),
        Finding("The best of 8 by it is right more often than one solution.", beats(c, "best_of_n", METHOD, [ALIKE])),
        Finding("A vote weighted by it is right more often than a plain vote.", beats(c, "vote", METHOD, [ALIKE])),
        Finding(
            "It tells right from wrong: AUROC above 0.70 over all solutions.",
            above(Contrast(over(scored(c, METHOD)), "AUROC"), 0.70),
        ),
        Finding("It tells more than the mean log-likelihood of the solution.", above(_gain(c, PLAIN), 0)),
        Finding(
            "It tells more than the length of the solution and than chance.",
            all_of(*(above(_gain(c, name), 0) for name in (LENGTH, RANDOM))),
        ),
        describe("The higher the probability, the more solutions are right.", _fifths(c)),
    ]


def scored(c: Comparison, arm: str) -> Scored:
    """Every judged solution of each question, seeds together."""
    details = c.details(arm)
    questions = [details[i :: len(c.samples)] for i in range(len(c.samples))]
    return [np.array([row for d in question for row in d["scored"]], float).reshape(-1, 2) for question in questions]


def over(first: Scored, second: Scored | None = None) -> Interval:
    """AUROC over all solutions, or how much higher the first is, with its interval over questions."""

    def compute(pick: np.ndarray) -> float:
        return _pooled(first, pick) - (_pooled(second, pick) if second else 0.0)

    return bootstrap_statistic(compute, len(first))


def _pooled(questions: Scored, pick: np.ndarray) -> float:
    rows = np.concatenate([questions[i] for i in pick])
    return auroc(rows[:, 0], rows[:, 1])


def _gain(c: Comparison, arm: str) -> Contrast:
    return Contrast(over(scored(c, METHOD), scored(c, arm)), f"AUROC, {METHOD} - {arm}", "+.3f")


def _fifths(c: Comparison) -> str:
    rows = np.concatenate(scored(c, METHOD))
    fifths = [part.mean(0) for part in np.array_split(rows[rows[:, 0].argsort(kind="stable")], 5) if len(part)]
    return "mean probability and share of right, by fifths: " + ", ".join(
        f"{p:.2f}: {right:.2f}" for p, right in fifths
    )
