"""Does the wave move reflection words as it says, and does the text survive it?

The embedded model is no reasoning model, so this tests the mechanism on words that it does use. Whether accuracy on
mathematics rises needs a reasoning model and is not claimed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decode.cyclicreflex import CyclicReflectionLogitsProcessor, CyclicReflex, constant_schedule, triangular_wave
from ..decode.reasoning.reflection import reflection_token_ids
from ..decode.tip import ThoughtSwitchPenalty
from ..measure.compare import Comparison
from ..measure.task import Experiment, Finding, Subject
from ..measure.tasks.reflection import BOTTOM, TOP, ReflectionTask

PLAIN, CONSTANT, TIP, SHIFTED, METHOD = "plain", "constant", "tip", "wave, half a period later", "cyclicreflex"
WORDS = (" but", " However", " and")
DEFAULT = {"words": WORDS, "amplitude": 2.0, "period": 100.0, "end_think": None}
RESAMPLES = 2000


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    method: CyclicReflex | None = None,
) -> Experiment:
    """Plain sampling, a constant bias, TIP, the wave half a period later, and the wave, on the same prompts and seeds.

    What `method` sets replaces the defaults of this experiment: " but", " However", " and", amplitude 2, period 100.
    """
    method = CyclicReflex(**{**DEFAULT, **(method.model_dump(exclude_unset=True) if method else {})})
    token_ids = method.token_ids or reflection_token_ids(tokenizer, method.words, method.leading_space)
    task = ReflectionTask(model, tokenizer, token_ids, method.period, samples or 20)
    shared = {"words": method.words, "token_ids": method.token_ids, "leading_space": method.leading_space}
    tip = ThoughtSwitchPenalty(**shared, end_think=method.end_think)
    shifted = CyclicReflex(**{**dict(method), "shift": (method.shift + 0.5) % 1})
    strength = constant_strength(method)
    constant = CyclicReflectionLogitsProcessor(token_ids, schedule=constant_schedule(strength))
    subjects = [
        Subject(PLAIN, "plain"),
        Subject(CONSTANT, "control", {"bias": strength, "token_ids": list(token_ids)}, {"processors": [constant]}),
        Subject(TIP, "control", tip.model_dump(mode="json"), {"methods": [tip]}),
        Subject(SHIFTED, "control", shifted.model_dump(mode="json"), {"methods": [shifted]}),
        Subject(METHOD, "method", method.model_dump(mode="json"), {"methods": [method]}),
    ]
    return Experiment(
        slug="cyclicreflex",
        claim="The rate of reflection words follows exp(wave), at no large cost in fluency (mechanism only: "
        "the model is no reasoning model).",
        task=task,
        subjects=subjects,
        baseline=PLAIN,
        judge=lambda comparison: judge(comparison, task.wave(method.amplitude, method.shift)),
        seeds=tuple(seeds or (0, 1, 2)),
        batch=20,
        notes="Accuracy of a reasoning model is not measured here.",
    )


def constant_strength(method: CyclicReflex) -> float:
    """Twice the mean size of the wave: for a triangle, its amplitude."""
    t = np.arange(0, method.period, method.period / 1000)
    return round(2 * float(np.abs(triangular_wave(t, method.amplitude, method.period)).mean()), 6)


class Estimate(NamedTuple):
    """A number with its 95 % interval from resampled samples."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def phase_counts(comparison: Comparison, subject: str) -> np.ndarray:
    """Counts of a subject, summed over seeds: (samples, 2, bins), reflection tokens and all tokens."""
    details = comparison.details(subject)
    counts = np.array([[d["phase_hits"], d["phase_tokens"]] for d in details], float)
    return counts.reshape(len(comparison.experiment.seeds), -1, *counts.shape[1:]).sum(0)


def rates(counts: np.ndarray) -> np.ndarray:
    """Share of reflection tokens in each phase bin of counts (samples, 2, bins)."""
    hits, tokens = counts.sum(0)
    return hits / np.maximum(tokens, 1)


def correlation(counts: np.ndarray, factors: np.ndarray) -> float:
    """Correlation over phase bins of the rate with exp(wave); NaN when either is constant."""
    rate = rates(counts)
    if rate.std() == 0 or factors.std() == 0:
        return float("nan")
    return float(np.corrcoef(rate, factors)[0, 1])


def top_over_bottom(counts: np.ndarray, factors: np.ndarray) -> float:
    """Rate in the highest quarter of the unshifted wave over the lowest; half a hit is added to both."""
    hits, tokens = counts.sum(0)
    top, bottom = list(TOP), list(BOTTOM)
    return float((hits[top].sum() + 0.5) / tokens[top].sum() / ((hits[bottom].sum() + 0.5) / tokens[bottom].sum()))


def estimate(statistic, counts: np.ndarray, factors: np.ndarray) -> Estimate:
    """The statistic with its percentile bootstrap interval over samples."""
    value = statistic(counts, factors)
    if np.isnan(value):
        return Estimate(value, value, value)
    picks = np.random.default_rng(0).integers(0, len(counts), (RESAMPLES, len(counts)))
    low, high = np.nanpercentile([statistic(counts[p], factors) for p in picks], [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def judge(comparison: Comparison, factors: np.ndarray) -> list[Finding]:
    """The mechanism, the controls that must not show it, and the fluency."""
    counts = {s: phase_counts(comparison, s) for s in comparison.subjects}
    follows = {s: estimate(correlation, c, factors) for s, c in counts.items()}
    ratio = {s: estimate(top_over_bottom, c, factors) for s, c in counts.items()}
    fluency = comparison.difference(METHOD, PLAIN, "logprob")
    blunt = comparison.difference(METHOD, CONSTANT, "logprob")
    flat = [PLAIN, CONSTANT, TIP]
    return [
        Finding(
            "the rate of reflection words follows exp(wave) over the phase, correlation above 0.8",
            follows[METHOD].value > 0.8,
            f"correlation: {follows[METHOD]}",
        ),
        Finding(
            "the top quarter of the wave has more than 3 times the rate of the bottom quarter",
            ratio[METHOD].value > 3,
            f"top / bottom: {ratio[METHOD]}",
        ),
        Finding(
            "it is the wave and not the place in the text: without a wave the ratio is below 3, half a period later it "
            "turns round",
            all(ratio[s].value < 3 for s in flat) and ratio[SHIFTED].value < 1 / 3,
            "top / bottom: " + "; ".join(f"{s} {ratio[s]}" for s in [*flat, SHIFTED]),
        ),
        Finding(
            "the text stays fluent: at most 0.5 nats per token less likely under the plain model",
            fluency.low > -0.5,
            f"nats per token, wave - plain: {Estimate(*fluency[:3])}; wave - constant: {Estimate(*blunt[:3])}",
        ),
    ]
