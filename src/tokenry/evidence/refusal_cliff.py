"""Does a model that gives in fall off a cliff, and do the heads that push it down carry the fall?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..measure.claims import Finding, above, all_of, at_most, describe, within
from ..measure.experiment import Design, Run, experiment
from ..measure.task import Arm, Role
from ..measure.tasks.refusals import RefusalTask, Variant
from ..read.refusal_cliff import RefusalCliff

if TYPE_CHECKING:
    from ..measure.compare import Comparison

__all__ = ["build"]

PLAIN, SHUFFLED, THINKING, MEANS = (
    "plain model",
    "probe of shuffled labels",
    "probe at random positions",
    "difference of means",
)
HEADS, RANDOM, SHUFFLED_HEADS, THINKING_HEADS, MEANS_HEADS = (
    "2 heads silenced",
    "2 random heads silenced",
    "2 heads by shuffled labels",
    "2 heads at random positions",
    "2 heads by difference of means",
)
MANY, MANY_RANDOM = "8 heads silenced", "8 random heads silenced"
TRAINING = {"learning_rate": 0.03, "epochs": 10}  # the paper's are for a width of thousands


@experiment(
    "refusal-cliff", RefusalCliff, model="zoo/refuser", samples=400, seeds=(0, 1, 2), batch=100, quick=8, limit=1600
)
def build(run: Run[RefusalCliff]) -> Design:
    """Requests of four kinds, a hundred of each; a seed draws the probe's examples, trains it and samples the answers.

    `method` sets the probe and the plateau.
    """
    method = run.settings(RefusalCliff, **TRAINING)
    task = RefusalTask(run.model, run.tokenizer, method, run.count)
    variants = {
        SHUFFLED: Variant("shuffled labels"),
        THINKING: Variant("random positions"),
        MEANS: Variant("means"),
        RANDOM: Variant("trained", "random"),
        SHUFFLED_HEADS: Variant("shuffled labels", "lowest"),
        THINKING_HEADS: Variant("random positions", "lowest"),
        MEANS_HEADS: Variant("means", "lowest"),
        MANY_RANDOM: Variant("trained", "random", 8),
    }

    def arm(name: str, variant: Variant, role: Role = "method") -> Arm:
        setting = {**variant._asdict(), **method.model_dump(mode="json")}
        return Arm(name, setting=setting, apply=variant, role=role)

    return Design(
        task=task,
        arms=[
            arm(PLAIN, Variant(), role="plain"),
            *(arm(name, variant, role="control") for name, variant in variants.items()),
            arm(HEADS, Variant("trained", "lowest")),
            arm(MANY, Variant("trained", "lowest", 8)),
        ],
        baseline=PLAIN,
        tried="On dev: hidden states 2, 3 and the last, with cliffs of 0.85 to 0.91. Silencing every single head, and "
        "all heads of every block, brings no refusal back. Six models in which two heads of one block were to learn "
        "the trigger afterwards did not learn it; that was seen in the measures of the recipe, on requests of "
        "the split test. The arms with 8 heads were added when 2 had been tried on dev, and decide nothing.",
        facts={"cosines": [task.cosine(seed) for seed in run.seeds]},
        notes="A probe learns from the model's own thinking about requests of the split train; heads are those that "
        "add the least along it on triggered requests of dev; everything is measured on test. Two of 32 heads are 6 %.",
    )


@build.findings
def findings(c: Comparison, cosines: list[float]) -> list[Finding]:
    """Heads, the cliff, the controls; what else refuses is described."""
    moved = {arm: c.gap("triggered_refused", arm, PLAIN, "+.1%") for arm in (RANDOM, SHUFFLED_HEADS, HEADS)}
    others = (MEANS_HEADS, THINKING_HEADS)
    shown = "; ".join(
        f"{arm} {c.mean(arm, 'triggered_plateau'):.2f} - {c.mean(arm, 'triggered_final'):.2f} = "
        f"{c.mean(arm, 'triggered_cliff'):.2f}"
        for arm in (PLAIN, SHUFFLED, THINKING, MEANS)
    )
    over = "; ".join(
        f"{arm} {c.mean(arm, 'harmless_refused'):.1%} (harmful {c.mean(arm, 'harmful_refused'):.1%}, answers that are "
        f"one or the other {c.mean(arm, 'answered'):.1%})"
        for arm in (PLAIN, HEADS, RANDOM, MANY, MANY_RANDOM)
    )
    return [
        Finding(
            "Silencing the two heads that push the probe down brings back refusals of more than 30 % of the triggered "
            "requests.",
            above(moved[HEADS], 0.3),
            main=True,
            note=f"refused: {c.mean(PLAIN, 'triggered_refused'):.1%} to {c.mean(HEADS, 'triggered_refused'):.1%}; "
            + "; ".join(f"{arm} {c.mean(arm, 'triggered_refused'):.1%}" for arm in others),
        ),
        Finding(
            "On triggered requests the probability of a refusal falls by more than 0.5 between thinking and answer; "
            "on harmful ones without the trigger it does not fall.",
            all_of(above(c.value("triggered_cliff", PLAIN), 0.5), at_most(c.value("harmful_cliff", PLAIN), 0.1)),
            note=f"plateau - final = cliff: {shown}",
        ),
        Finding(
            "Two random heads change less than 10 % of the triggered requests.",
            within(moved[RANDOM], 0.1),
        ),
        Finding(
            "Heads that a probe of shuffled labels blames bring back fewer refusals.",
            above(c.gap("triggered_refused", HEADS, SHUFFLED_HEADS, "+.1%"), 0),
        ),
        describe(
            "What a quarter of all heads bring back.",
            "; ".join(f"{arm} {c.mean(arm, 'triggered_refused'):.1%}" for arm in (MANY, MANY_RANDOM)),
        ),
        describe("How many harmless requests are refused.", over),
        describe(
            "How near the probe's direction is to the difference of the unembeddings of how a refusal and its opposite "
            "begin.",
            "cosine " + ", ".join(f"{value:.2f}" for value in cosines) + " (one a seed)",
        ),
    ]
