"""ARISE: how well a model turns more thinking tokens into right answers, question by question.

Paper: ARISE: An Adaptive Resolution-Aware Metric for Test-Time Scaling Evaluation in Large Reasoning Models,
arXiv 2510.06014. For question i with accuracies a_j and tokens t_j at levels j = 0..J of effort,

    ARISE_i = sum_j d_j (t_(j-1) / t_j)^sign(d_j),  d_j = a_j - a_(j-1),

so that a gain counts less the more tokens it took, and a loss counts more. ARISE is the mean over questions. Tokens are
those generated, without the prompt's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
from annotated_types import Gt, Le
from pydantic import BaseModel, Field

from ..core.fields import Count, Seed, check
from .contract import Report, ResultsMethod
from .scaling.answer import AriseAnswer, LevelMeans, LossAnswer, NullValue, QuestionScore
from .scaling.picture import scaling_picture
from .scaling.results import Results, checked_arrays

__all__ = ["Arise", "AriseReport", "AriseResult", "Loss", "arise_score", "bootstrap_ci", "negative_scaling", "slope"]

Ratio = Annotated[float, Gt(1), Le(10_000)]


class Arise(ResultsMethod):
    """Scores how answers change with effort: cheap gains count most, expensive losses cost most.

    report = Arise().compute(accuracies=[[0, 1], [1, 1]], tokens=[[10, 20], [15, 40]])
    """

    slug: ClassVar[str] = "arise"
    title: ClassVar[str] = "ARISE"
    paper: ClassVar[str] = (
        "ARISE: An Adaptive Resolution-Aware Metric for Test-Time Scaling Evaluation in Large Reasoning Models, "
        "arXiv 2510.06014"
    )
    claim: ClassVar[str] = (
        "Following single questions over levels of effort shows losses that the slope of means hides."
    )

    output: ClassVar[type[BaseModel]] = AriseAnswer

    severe_ratio: Ratio = Field(default=1.5, description="a loss at more than this many times the tokens is severe")
    resamples: Count = Field(default=1000, description="bootstrap samples of the questions, for the interval")
    permutations: Count = Field(default=1000, description="permutations of each question's levels, for the null value")
    seed: Seed = Field(default=0, description="of both")

    def judge(self, results: Results) -> AriseReport:
        """The score with its interval, its null value and the losses."""
        accuracies, tokens = results.accuracies, results.tokens
        score = arise_score(accuracies, tokens)
        low, high = bootstrap_ci(score, self.resamples, self.seed)
        null = permuted_scores(accuracies, tokens, self.permutations, self.seed)
        losses = negative_scaling(accuracies, tokens, self.severe_ratio)
        return AriseReport(results, score, low, high, null, slope(accuracies, tokens), losses)

    def compute(self, accuracies: Any, tokens: Any) -> AriseReport:
        """`judge` of two tables (questions, levels), levels from the least effort to the most."""
        return self.judge(Results.from_arrays(accuracies, tokens))


@dataclass(frozen=True)
class AriseResult:
    """The score of N questions.

    Attributes:
        per_sample: (N,) of each question; `std`: their population standard deviation.
        improved, degraded: steps from one level to the next in which accuracy grew or fell.
        always_right, always_wrong: questions with accuracy 1 or 0 at every level.
    """

    score: float
    per_sample: np.ndarray
    std: float
    improved: int
    degraded: int
    always_right: int
    always_wrong: int

    @property
    def median(self) -> float:
        """Of the questions. One loss at ten times the tokens is -10, and may be most of the mean."""
        return float(np.median(self.per_sample))

    @property
    def clipped(self) -> float:
        """The mean of the questions' scores, each cut to [-1, 1]."""
        return float(self.per_sample.clip(-1, 1).mean())


def arise_score(accuracies: Any, tokens: Any) -> AriseResult:
    """The score of two tables (questions, levels).

    Raises:
        InputError: see `checked_arrays`.
    """
    a, t = checked_arrays(accuracies, tokens)
    scores, steps = _scores(a, t), np.diff(a, axis=1)
    return AriseResult(
        score=float(scores.mean()),
        per_sample=scores,
        std=float(scores.std()),
        improved=int((steps > 0).sum()),
        degraded=int((steps < 0).sum()),
        always_right=int((a == 1).all(1).sum()),
        always_wrong=int((a == 0).all(1).sum()),
    )


def _scores(a: np.ndarray, t: np.ndarray) -> np.ndarray:
    """(N,) of each question."""
    steps = np.diff(a, axis=1)
    return (steps * (t[:, :-1] / t[:, 1:]) ** np.sign(steps)).sum(1)


def bootstrap_ci(result: AriseResult, n: int = 1000, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the score, by `n` bootstrap samples of the questions."""
    check("n", n, Count)
    rng, count = np.random.default_rng(seed), len(result.per_sample)
    means = [result.per_sample[rng.integers(0, count, count)].mean() for _ in range(n)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def permuted_scores(accuracies: np.ndarray, tokens: np.ndarray, n: int = 1000, seed: int = 0) -> np.ndarray:
    """(n,) scores with each question's accuracies dealt to its levels by chance: their mean is the null value.

    It is not 0 but below, since losses are weighted up and gains down.
    """
    rng = np.random.default_rng(seed)
    return np.array([_scores(rng.permuted(accuracies, axis=1), tokens).mean() for _ in range(n)])


def slope(accuracies: Any, tokens: Any) -> float:
    """The metric to compare with: gain in mean accuracy per token from the first level to the last; 0 unless tokens
    grow."""
    a, t = (table.mean(0) for table in checked_arrays(accuracies, tokens))
    return float((a[-1] - a[0]) / (t[-1] - t[0])) if t[-1] > t[0] else 0.0


class Loss(NamedTuple):
    """A step from level `level - 1` to `level`, both counted from 0, in which a question lost accuracy.

    `ratio` is new to old tokens, and `penalty` = -ratio the weight of a whole loss.
    """

    question: int
    level: int
    drop: float
    extra_tokens: float
    ratio: float
    penalty: float
    severe: bool


def negative_scaling(accuracies: Any, tokens: Any, severe_ratio: float = 1.5) -> list[Loss]:
    """Every step that lost accuracy, by question and level.

    Args:
        severe_ratio: a loss at more than this many times the tokens is severe.
    """
    check("severe_ratio", severe_ratio, Ratio)
    a, t = checked_arrays(accuracies, tokens)
    found = []
    for i, j in np.argwhere(np.diff(a, axis=1) < 0).tolist():
        ratio = float(t[i, j + 1] / t[i, j])
        drop, extra = float(a[i, j] - a[i, j + 1]), float(t[i, j + 1] - t[i, j])
        found.append(Loss(i, j + 1, drop, extra, ratio, -ratio, ratio > severe_ratio))
    return found


@dataclass(frozen=True)
class AriseReport(Report):
    """What ARISE says of results.

    Attributes:
        low, high: the score's 95 % interval over questions.
        null: scores of permuted levels, see `permuted_scores`.
        losses: every step that lost accuracy.
    """

    results: Results
    result: AriseResult
    low: float
    high: float
    null: np.ndarray
    slope: float
    losses: list[Loss]

    @property
    def null_value(self) -> float:
        return float(self.null.mean())

    @property
    def p_value(self) -> float:
        """The share of permutations, this order counted among them, that score at least as high."""
        return float((1 + (self.null >= self.result.score - 1e-12).sum()) / (1 + len(self.null)))

    def to_json(self) -> dict[str, Any]:
        """All numbers, as `AriseAnswer` declares them."""
        names, levels = self.results.questions, self.results.levels
        per_question = zip(names, self.result.per_sample.tolist(), strict=True)
        low, high = np.percentile(self.null, [2.5, 97.5]).tolist()
        return AriseAnswer(
            score=self.result.score,
            interval=(self.low, self.high),
            null=NullValue(mean=self.null_value, interval=(low, high), p_value=self.p_value),
            median=self.result.median,
            clipped=self.result.clipped,
            std=self.result.std,
            slope=self.slope,
            improved_steps=self.result.improved,
            degraded_steps=self.result.degraded,
            always_right=self.result.always_right,
            always_wrong=self.result.always_wrong,
            levels=[
                LevelMeans(level=level, accuracy=a, tokens=t)
                for level, a, t in zip(levels, self.results.accuracies.mean(0), self.results.tokens.mean(0))
            ],
            questions=[QuestionScore(question=name, score=score) for name, score in per_question],
            losses=[
                LossAnswer(**{**loss._asdict(), "question": names[loss.question], "level": levels[loss.level]})
                for loss in self.losses
            ],
        ).model_dump()

    def table(self) -> str:
        """The numbers as lines of text, with the ten worst losses."""
        r, losses = self.result, sorted(self.losses, key=lambda loss: loss.drop * loss.penalty)
        severe = sum(loss.severe for loss in losses)
        lines = [
            f"ARISE {r.score:+.3f} [{self.low:+.3f}, {self.high:+.3f}] over {len(r.per_sample)} questions; "
            f"permuted levels {self.null_value:+.3f} (p {self.p_value:.3f})",
            f"median {r.median:+.3f}, clipped to [-1, 1] {r.clipped:+.3f}, slope {self.slope:+.3g} per token",
            f"steps: {r.improved} better, {r.degraded} worse ({severe} severe); questions: {r.always_right} always "
            f"right, {r.always_wrong} always wrong",
        ]
        for level, a, t in zip(self.results.levels, self.results.accuracies.mean(0), self.results.tokens.mean(0)):
            lines.append(f"  level {level}: accuracy {a:.3f}, {t:.1f} tokens")
        for loss in losses[:10]:
            name, level = self.results.questions[loss.question], self.results.levels[loss.level]
            lines.append(f"  loss of {loss.drop:.2f} at level {level}, {loss.ratio:.1f} x the tokens: {name[:60]}")
        return "\n".join(lines)

    def picture(self) -> str:
        """Accuracy and tokens by level, each question a line, as an SVG text."""
        title = f"ARISE {self.result.score:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"
        return scaling_picture(self.results, self.result.per_sample, title)
