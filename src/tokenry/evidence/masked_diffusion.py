"""How many forwards does a masked-diffusion model need for an answer, and which rules give quality away?

One token per step is the slow decoder. A fixed number of tokens per step is the control that commits as many without
asking whether the model is sure, and random positions, or each mask by chance, do not even ask which it is surest of.
The threshold that is judged is chosen on dev problems; the published one is a row.
"""

from __future__ import annotations

from ..decode.masked_diffusion import MaskedDiffusion
from ..measure.claims import Check, Finding, all_of, at_least, below, describe, loses_at_most
from ..measure.compare import Comparison
from ..measure.experiment import Design, Run, experiment, sweep
from ..measure.task import Arm
from ..measure.tasks.denoising import PuzzleTask, on_dev

BLOCK, WIDTH, BATCH = 8, 24, 60
PLAIN, THRESHOLD, FACTOR, FIXED, RANDOM, CHANCE, CACHED = (
    "one token per step",
    "threshold",
    "factor",
    "steps",
    "steps, random positions",
    "steps, by chance",
    "threshold 0.9, cache",
)
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
PUBLISHED = 0.9
STEPS = (3, 6, 12)  # and the plain decoder's; in 3 steps, one for each block, there is no order
DEV = 600
SPEEDUP, MARGIN = 3.0, 0.01  # forwards of the slow decoder over those of a threshold; exact match that may be lost


@experiment(
    "masked-diffusion",
    MaskedDiffusion,
    model="zoo/denoiser",
    samples=1000,
    seeds=(0, 1, 2),
    batch=BATCH,
    quick=6,
)
def build(run: Run[MaskedDiffusion]) -> Design:
    """Every rule, swept. Policy and its numbers are varied; the rest is that of `method`."""
    method = run.settings(MaskedDiffusion, block_length=BLOCK)
    plain = method.model_copy(update={"policy": "fixed"})
    slow = Arm(PLAIN, plain, "plain", sweep=FIXED, value=WIDTH)  # where a fixed number of tokens ends, too
    thresholds = sweep(THRESHOLD, method, policy="threshold", threshold=THRESHOLDS)
    dev = PuzzleTask(run.model, run.tokenizer, (0,), min(run.count, DEV), WIDTH, split="dev")
    tau, tried = choose(on_dev(dev, [slow, *thresholds], BATCH))
    return Design(
        task=PuzzleTask(run.model, run.tokenizer, run.seeds, run.count, WIDTH),
        arms=[
            slow,
            *thresholds,
            *sweep(FACTOR, method, policy="factor", factor=(0.25, 0.5, 1.0, 2.0)),
            *sweep(FIXED, method, "control", policy="fixed", steps=STEPS),
            *sweep(RANDOM, method, "control", policy="fixed", steps=(*STEPS[1:], WIDTH), confidence="random"),
            *sweep(CHANCE, method, "control", policy="chance", steps=(*STEPS[1:], WIDTH)),
            *sweep(CACHED, method, policy="threshold", threshold=PUBLISHED, cache=("prefix", "dual")),
        ],
        baseline=PLAIN,
        facts={"tau": tau},
        notes=f"Windows of {WIDTH}, blocks of {method.block_length}. Each seed has problems of its own; decoding takes "
        f"the most likely tokens. Seconds are those of a batch of {BATCH}, shared by its rows.",
        tried=tried,
    )


def choose(dev: Comparison) -> tuple[float, str]:
    """The fastest threshold that keeps the margin on dev problems, or else the surest one; and what they all gave."""
    arms = dev.sweep(THRESHOLD)
    kept = [tau for tau, arm in arms.items() if loses_at_most(dev.gap("exact", arm, PLAIN), MARGIN).outcome == "holds"]
    tau = min(kept, key=lambda tau: dev.mean(arms[tau], "forward_passes"), default=max(arms))
    shown = ", ".join(
        f"{t} {dev.mean(arm, 'exact'):.4f} in {dev.mean(arm, 'forward_passes'):.2f}" for t, arm in arms.items()
    )
    return tau, (
        f"The threshold {tau} is the fastest of those that lose at most {MARGIN} on {len(dev.samples)} dev problems, "
        f"which every run computes. Exact match and forwards there: {shown}; {PLAIN} {dev.mean(PLAIN, 'exact'):.4f}."
    )


@build.findings
def findings(c: Comparison, tau: float) -> list[Finding]:
    """Forwards, quality given away, what confidence is good for; order, factor, and caches are described."""
    threshold, cached = c.sweep(THRESHOLD), c.sweep(CACHED)
    chosen, usual, low = threshold[tau], threshold[PUBLISHED], threshold[min(THRESHOLDS)]
    fixed = c.sweep(FIXED)
    orders = [c.gap("exact", fixed[n], c.sweep(kind)[n]) for kind in (RANDOM, CHANCE) for n in (*STEPS[1:], WIDTH)]
    return [
        Finding(
            f"the threshold chosen on dev problems, {tau}, takes at least {SPEEDUP:g} times fewer forwards than one "
            f"token per step, exact match falls by at most {MARGIN}",
            _as_well(c, chosen),
            main=True,
        ),
        Finding(f"so does the published threshold, {PUBLISHED}", _as_well(c, usual)),
        Finding(
            f"committing too much at once costs quality: at {min(THRESHOLDS)} exact match is lower",
            below(c.gap("exact", low, PLAIN), 0),
            note=f"{c.mean(low, 'forward_passes'):.2f} forwards",
        ),
        Finding(
            "at equal exact match, thresholds take fewer forwards than a fixed number of tokens per step",
            below(c.frontier("forward_passes", THRESHOLD, FIXED, at="exact"), 1),
            note=str(c.frontier("forward_passes", FACTOR, THRESHOLD, at="exact")),
        ),
        describe(
            "the surest ones first, against random ones and each by chance, in as many steps",
            "; ".join(map(str, orders)),
        ),
        describe(
            "caches",
            "; ".join(
                f"{c.ratio('tokens_processed', cache, usual)}; {c.gap('exact', cache, usual)}"
                for cache in cached.values()
            ),
        ),
    ]


def _as_well(c: Comparison, arm: str) -> Check:
    """As good as one token per step, in a few forwards."""
    return all_of(
        at_least(c.ratio("forward_passes", PLAIN, arm), SPEEDUP), loses_at_most(c.gap("exact", arm, PLAIN), MARGIN)
    )
