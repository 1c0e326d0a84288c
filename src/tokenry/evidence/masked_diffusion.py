"""How many forwards does a masked-diffusion model need for an answer, and which rules give quality away?

One token per step is the slow decoder. A fixed number of tokens per step is the control that commits as many without
asking whether the model is sure, and random positions, or each mask by chance, do not even ask which it is surest of.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decode.denoising.contract import DiffusionMethods
from ..decode.masked_diffusion import MaskedDiffusion
from ..measure.compare import Comparison
from ..measure.task import Experiment, Finding, Subject
from ..measure.tasks.denoising import PuzzleTask, cost_ratio

BLOCK, WIDTH = 8, 24
PLAIN, THRESHOLD, FACTOR, FIXED, RANDOM, CHANCE, CACHED = (
    "one token per step",
    "threshold",
    "factor",
    "steps",
    "steps, random positions",
    "steps, by chance",
    "threshold 0.9, cache",
)
SWEEPS = {
    THRESHOLD: (0.5, 0.7, 0.8, 0.9, 0.95, 0.99),
    FACTOR: (0.25, 0.5, 1.0, 2.0),
    FIXED: (3, 6, 12, 24),
    RANDOM: (3, 6, 12, 24),
    CHANCE: (3, 6, 12, 24),
    CACHED: ("prefix", "dual"),
}
SPEEDUP, MARGIN = 3.0, 0.01  # forwards of the slow decoder over those of a threshold; exact match that may be lost
DEFAULT, LOW = f"{THRESHOLD} 0.9", f"{THRESHOLD} 0.5"


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    method: MaskedDiffusion | None = None,
) -> Experiment:
    """Every rule, swept. Policy and its numbers are varied; the rest is that of `method`."""
    method = MaskedDiffusion(**{"block_length": BLOCK, **(method.model_dump(exclude_unset=True) if method else {})})
    seeds = tuple(seeds or (0, 1, 2))
    return Experiment(
        slug=MaskedDiffusion.slug,
        claim=MaskedDiffusion.claim,
        task=PuzzleTask(model, tokenizer, seeds, samples or 150, WIDTH),
        subjects=subjects(method),
        baseline=PLAIN,
        judge=judge,
        seeds=seeds,
        batch=50,
        notes=f"Windows of {WIDTH}, blocks of {method.block_length}. Each seed has problems of its own; decoding takes "
        "the most likely tokens. Seconds are those of a batch of 50, shared by its rows, which wait for the slowest "
        "one.",
    )


def name(kind: str, value: float | str) -> str:
    return f"{kind} {value}"


def sweep(kind: str) -> list[str]:
    return [name(kind, value) for value in SWEEPS[kind]]


def settings(kind: str, value: float | str) -> dict[str, float | str]:
    """What a subject of this kind sets."""
    return {
        THRESHOLD: {"policy": "threshold", "threshold": value},
        FACTOR: {"policy": "factor", "factor": value},
        FIXED: {"policy": "fixed", "steps": value},
        RANDOM: {"policy": "fixed", "steps": value, "confidence": "random"},
        CHANCE: {"policy": "chance", "steps": value},
        CACHED: {"policy": "threshold", "threshold": 0.9, "cache": value},
    }[kind]


def subjects(method: MaskedDiffusion) -> list[Subject]:
    """The slow decoder, then each rule with each of its numbers."""
    roles = dict.fromkeys((FIXED, RANDOM, CHANCE), "control")
    made = [(PLAIN, "plain", {"policy": "fixed"})]
    made += [(name(k, v), roles.get(k, "method"), settings(k, v)) for k, values in SWEEPS.items() for v in values]
    found = [(label, role, method.model_copy(update=change)) for label, role, change in made]
    return [
        Subject(label, role, one.model_dump(mode="json"), DiffusionMethods([one]).options) for label, role, one in found
    ]


def judge(comparison: Comparison) -> list[Finding]:
    """Forwards, quality given away, what confidence is good for, factor, and caches."""
    passes = {label: comparison.mean(label, "forward_passes") for label in comparison.subjects}
    quality = {label: comparison.difference(label, PLAIN, "exact") for label in (DEFAULT, LOW)}
    even, factor = (
        cost_ratio(comparison, sweep(a), sweep(b), "forward_passes", "exact")
        for a, b in ((THRESHOLD, FIXED), (FACTOR, THRESHOLD))
    )
    return [
        Finding(
            f"a threshold of 0.9 takes at least {SPEEDUP:g} times fewer forwards than one token per step, exact match "
            f"within {MARGIN}",
            passes[PLAIN] >= SPEEDUP * passes[DEFAULT] and quality[DEFAULT].low > -MARGIN,
            f"{passes[PLAIN]:.2f} / {passes[DEFAULT]:.2f} = {passes[PLAIN] / passes[DEFAULT]:.2f} times; exact match "
            f"{quality[DEFAULT]:+.3f}",
        ),
        Finding(
            "committing too much at once costs quality: at 0.5 exact match is lower",
            quality[LOW].high < 0,
            f"exact match {quality[LOW]:+.3f}, with {passes[LOW]:.2f} forwards",
        ),
        Finding(
            "at equal exact match, thresholds take fewer forwards than a fixed number of tokens per step",
            even.high < 1,
            f"forwards, threshold / fixed number: {even:.3f}; factor / threshold: {factor:.3f}",
        ),
        order(comparison),
        caches(comparison),
    ]


def order(comparison: Comparison) -> Finding:
    """Whether it matters which tokens are committed first, at the same number of steps."""
    gains = {
        name(kind, n): comparison.difference(name(FIXED, n), name(kind, n), "exact")
        for kind in (RANDOM, CHANCE)
        for n in SWEEPS[kind][1:]  # in one step for each block there is no order
    }
    return Finding(
        "it matters which are committed first: the surest ones, not random ones, at the same number of steps",
        all(gain.low > 0 for gain in gains.values()),
        "exact match, surest - " + "; ".join(f"{label}: {gain:+.3f}" for label, gain in gains.items()),
    )


def caches(comparison: Comparison) -> Finding:
    """What keeping keys and values saves, and costs."""
    lost = {label: comparison.difference(label, DEFAULT, "exact") for label in sweep(CACHED)}
    fed = {n: comparison.mean(n, "tokens_processed") / comparison.mean(DEFAULT, "tokens_processed") for n in lost}
    return Finding(
        f"caches feed fewer tokens, exact match within {MARGIN}",
        all(fed[label] < 1 and lost[label].low > -MARGIN for label in lost),
        "; ".join(f"{label}: {fed[label]:.2f} of the tokens, exact match {lost[label]:+.3f}" for label in lost),
    )
