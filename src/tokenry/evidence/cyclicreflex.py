"""Does the wave move reflection words as it says, and does the text survive it?

The embedded model is no reasoning model, so this tests the mechanism on words that it does use. Whether accuracy on
mathematics rises needs a reasoning model and is not claimed here.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..decode.cyclicreflex import CyclicReflectionLogitsProcessor, CyclicReflex, constant_schedule, triangular_wave
from ..decode.reasoning.reflection import reflection_token_ids
from ..decode.tip import ThoughtSwitchPenalty
from ..measure.claims import Contrast, Finding, above, all_of, at_least, below
from ..measure.compare import Comparison
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import bootstrap_statistic
from ..measure.task import Arm
from ..measure.tasks.reflection import BOTTOM, TOP, ReflectionTask

PLAIN, CONSTANT, TIP, SHIFTED, METHOD = "plain", "constant", "tip", "wave, half a period later", "cyclicreflex"
WORDS = (" but", " However", " and")
DEFAULT = {"words": WORDS, "amplitude": 2.0, "period": 100.0, "end_think": None}
RESAMPLES = 2000


@experiment(
    "cyclicreflex",
    CyclicReflex,
    samples=20,
    seeds=range(3, 8),
    batch=20,
    quick=2,
    claim="Mechanism: the rate of reflection words follows exp(wave), at no large cost in fluency. Whether more "
    "problems are solved, which is the method's claim, is measured by cyclicreflex-reasoner.",
)
def build(run: Run[CyclicReflex]) -> Design:
    """Plain sampling, a constant bias, TIP, the wave half a period later, and the wave, on the same prompts and seeds.

    What `method` sets replaces the defaults of this experiment: " but", " However", " and", amplitude 2, period 100.
    """
    method = run.settings(CyclicReflex, **DEFAULT)
    token_ids = method.token_ids or reflection_token_ids(run.tokenizer, method.words, method.leading_space)
    task = ReflectionTask(run.model, run.tokenizer, token_ids, method.period, run.count)
    shared = {"words": method.words, "token_ids": method.token_ids, "leading_space": method.leading_space}
    strength = constant_strength(method)
    constant = CyclicReflectionLogitsProcessor(token_ids, schedule=constant_schedule(strength))
    bias = {"bias": strength, "token_ids": list(token_ids)}
    return Design(
        task=task,
        arms=[
            Arm(PLAIN, role="plain"),
            Arm(CONSTANT, role="control", setting=bias, apply={"processors": [constant]}),
            Arm(TIP, ThoughtSwitchPenalty(**shared, end_think=method.end_think), "control"),
            Arm(SHIFTED, CyclicReflex(**{**dict(method), "shift": (method.shift + 0.5) % 1}), "control"),
            Arm(METHOD, method),
        ],
        baseline=PLAIN,
        facts={"factors": task.wave(method.amplitude, method.shift)},
        tried="Seeds 0 to 2, whose interval of the correlation was on both sides of 0.8.",
    )


def constant_strength(method: CyclicReflex) -> float:
    """Twice the mean size of the wave: for a triangle, its amplitude."""
    t = np.arange(0, method.period, method.period / 1000)
    return round(2 * float(np.abs(triangular_wave(t, method.amplitude, method.period)).mean()), 6)


def phase_counts(c: Comparison, arm: str) -> np.ndarray:
    """Counts of an arm, summed over seeds: (samples, 2, bins), reflection tokens and all tokens."""
    counts = np.array([[d["phase_hits"], d["phase_tokens"]] for d in c.details(arm)], float)
    return counts.reshape(len(c.experiment.seeds), -1, *counts.shape[1:]).sum(0)


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


@build.findings
def findings(c: Comparison, factors: np.ndarray) -> list[Finding]:
    """The mechanism, the controls that must not show it, and the fluency."""
    counts = {arm: phase_counts(c, arm) for arm in c.arms}

    def over(statistic: Callable[..., float], arm: str, what: str) -> Contrast:
        found = bootstrap_statistic(lambda pick: statistic(counts[arm][pick], factors), len(c.samples), RESAMPLES)
        return Contrast(found, f"{what}, {arm}", ".2f")

    ratio = {arm: over(top_over_bottom, arm, "top / bottom") for arm in c.arms}
    return [
        Finding(
            "the rate of reflection words follows exp(wave) over the phase",
            above(over(correlation, METHOD, "correlation"), 0.8),
            main=True,
        ),
        Finding(
            "the top quarter of the wave has more than 3 times the rate of the bottom quarter", above(ratio[METHOD], 3)
        ),
        Finding(
            "it is the wave and not the place in the text: without a wave the ratio is below 3, half a period later it "
            "turns round",
            all_of(below(ratio[SHIFTED], 1 / 3), *(below(ratio[arm], 3) for arm in (PLAIN, CONSTANT, TIP))),
        ),
        Finding(
            "the text stays fluent: at most 0.5 nats per token less likely under the plain model",
            at_least(c.gap("logprob", METHOD, PLAIN, "+.2f"), -0.5),
            note=str(c.gap("logprob", METHOD, CONSTANT, "+.2f")),
        ),
    ]
