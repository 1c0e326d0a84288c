"""How many forwards does a masked-diffusion model need for an answer, and which rules give quality away?

One token per step is the slow decoder. A fixed number of tokens per step is the control that commits as many without
asking whether the model is sure, and random positions, or each mask by chance, do not even ask which it is surest of.
"""

from __future__ import annotations

from ..decode.masked_diffusion import MaskedDiffusion
from ..measure.claims import Finding, above, all_of, at_least, below, loses_at_most
from ..measure.compare import Comparison
from ..measure.experiment import Design, Run, experiment, sweep
from ..measure.task import Arm
from ..measure.tasks.denoising import PuzzleTask

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
STEPS = (3, 6, 12, 24)
SPEEDUP, MARGIN = 3.0, 0.01  # forwards of the slow decoder over those of a threshold; exact match that may be lost


@experiment(
    "masked-diffusion",
    MaskedDiffusion,
    model="zoo/denoiser",
    samples=150,
    seeds=(0, 1, 2),
    batch=50,
    quick=6,
    limit=1000,
)
def build(run: Run) -> Design:
    """Every rule, swept. Policy and its numbers are varied; the rest is that of `method`."""
    method = run.settings(MaskedDiffusion, block_length=BLOCK)
    return Design(
        task=PuzzleTask(run.model, run.tokenizer, run.seeds, run.samples, WIDTH),
        arms=[
            Arm(PLAIN, method.model_copy(update={"policy": "fixed"}), "plain"),
            *sweep(THRESHOLD, method, policy="threshold", threshold=(0.5, 0.7, 0.8, 0.9, 0.95, 0.99)),
            *sweep(FACTOR, method, policy="factor", factor=(0.25, 0.5, 1.0, 2.0)),
            *sweep(FIXED, method, "control", policy="fixed", steps=STEPS),
            *sweep(RANDOM, method, "control", policy="fixed", steps=STEPS, confidence="random"),
            *sweep(CHANCE, method, "control", policy="chance", steps=STEPS),
            *sweep(CACHED, method, policy="threshold", threshold=0.9, cache=("prefix", "dual")),
        ],
        baseline=PLAIN,
        notes=f"Windows of {WIDTH}, blocks of {method.block_length}. Each seed has problems of its own; decoding takes "
        "the most likely tokens. Seconds are those of a batch of 50, shared by its rows, which wait for the slowest "
        "one.",
    )


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """Forwards, quality given away, what confidence is good for, factor, and caches."""
    threshold, fixed, cached = (c.sweep(name) for name in (THRESHOLD, FIXED, CACHED))
    usual, low = threshold[0.9], threshold[0.5]
    orders = [  # in one step for each block there is no order
        above(c.gap("exact", fixed[n], c.sweep(kind)[n]), 0) for kind in (RANDOM, CHANCE) for n in STEPS[1:]
    ]
    return [
        Finding(
            f"a threshold of 0.9 takes at least {SPEEDUP:g} times fewer forwards than one token per step, exact match "
            f"falls by at most {MARGIN}",
            all_of(
                at_least(c.ratio("forward_passes", PLAIN, usual), SPEEDUP),
                loses_at_most(c.gap("exact", usual, PLAIN), MARGIN),
            ),
            main=True,
        ),
        Finding(
            "committing too much at once costs quality: at 0.5 exact match is lower",
            below(c.gap("exact", low, PLAIN), 0),
            note=f"{c.mean(low, 'forward_passes'):.2f} forwards",
        ),
        Finding(
            "at equal exact match, thresholds take fewer forwards than a fixed number of tokens per step",
            below(c.frontier("forward_passes", THRESHOLD, FIXED, at="exact"), 1),
            note=str(c.frontier("forward_passes", FACTOR, THRESHOLD, at="exact")),
        ),
        Finding(
            "it matters which are committed first: the surest ones, not random ones, at the same number of steps",
            all_of(*orders),
        ),
        Finding(
            f"caches feed fewer tokens, and exact match falls by at most {MARGIN}",
            all_of(
                *(below(c.ratio("tokens_processed", cache, usual), 1) for cache in cached.values()),
                *(loses_at_most(c.gap("exact", cache, usual), MARGIN) for cache in cached.values()),
            ),
        ),
    ]
