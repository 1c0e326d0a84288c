"""Is the sentence that a later one repeats the one that suppression and receiver heads find?"""

from __future__ import annotations

import numpy as np

from ..measure.claims import Contrast, Finding, above, at_least, describe
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import bootstrap_statistic
from ..measure.task import Arm, Role
from ..measure.tasks.planted import PlantedTask, heads_of_prose
from ..read.anchors.receivers import ReceiverHeads
from ..read.thought_anchors import ThoughtAnchors

__all__ = ["build"]

SUPPRESSION, RECEIVERS, RESAMPLING, FORCED = "suppression", "receiver heads", "resampling", "forced answers"
PLACE, RANDOM, SHUFFLED = "place alone", "random heads", "suppression, shuffled sentences"
ROUTES = {
    SUPPRESSION: "suppression",
    RECEIVERS: "receivers",
    RESAMPLING: "resampled",
    FORCED: "forced",
    PLACE: "place",
    RANDOM: "random",
    SHUFFLED: "shuffled",
}
ROLES: dict[str, Role] = {PLACE: "plain", RANDOM: "control", SHUFFLED: "control"}


@experiment("thought-anchors", ThoughtAnchors, samples=24, batch=1, quick=2)
def build(run: Run[ThoughtAnchors]) -> Design:
    """Texts of eight facts, one of which later sentences come back to; receiver heads are those of other prose."""
    method = run.settings(ThoughtAnchors, rollouts=run.size(6, 2))
    heads = heads_of_prose(run.model, run.tokenizer, run.size(12, 2), method)
    arms = [Arm(name, method, ROLES.get(name, "method"), apply=route) for name, route in ROUTES.items()]
    return Design(
        task=PlantedTask(run.model, run.tokenizer, run.count, heads, method),
        arms=arms,
        baseline=PLACE,
        facts={"heads": heads},
        tried="The first six texts were measured once; after that the number of texts was cut, for time. "
        "Resampling and forced answers were added later, when their scores of two texts had been looked at; what is "
        "written anew was then cut from 32 to 24 tokens, for time.",
        notes="Receiver heads are chosen on documentation of Python's libraries, not on the texts that are measured. "
        "Random heads are drawn anew for each text from the others behind layer 0. The place alone takes the fact "
        "nearest to the sentence that comes back to one. Resampling writes a fact and what follows it anew, asks for "
        "the planted number, and takes the accuracy with the fact kept minus that with it written anew; forced answers "
        "take the answer right behind the fact instead. Both share one score among facts more often than the others, "
        "and a planted fact that shares the highest is not first.",
    )


def split_half(heads: ReceiverHeads) -> Contrast:
    """Correlation of the kurtosis in two halves of the texts, resampled over heads."""
    halves = np.stack([heads.by_trace[i::2, 1:].nanmean(0).flatten().numpy() for i in (0, 1)])
    known = halves[:, np.isfinite(halves).all(0)]
    found = bootstrap_statistic(lambda pick: float(np.corrcoef(known[:, pick])[0, 1]), known.shape[1])
    return Contrast(found, f"split-half correlation over {len(heads.by_trace)} texts", ".2f")


@build.findings
def findings(c: Comparison, heads: ReceiverHeads) -> list[Finding]:
    """The planted sentence, the reliability of heads, the agreement of routes."""
    ranks = ", ".join(f"{name} {c.mean(name, 'rank'):.2f}" for name in ROUTES)
    return [
        Finding(
            "Hiding the planted fact changes the sentence that repeats it most, in at least nine of ten texts.",
            at_least(c.value("first", SUPPRESSION, ".1%"), 0.9),
            main=True,
            note=f"mean rank of the planted fact: {ranks}",
        ),
        Finding(
            "No control finds the planted fact as often.",
            beats(c, "first", SUPPRESSION, [*ROLES]),
        ),
        Finding(
            "What makes a receiver head is the same in two halves of the texts.",
            above(split_half(heads), 0.5),
        ),
        Finding(
            "Receiver heads find the planted fact more often than random heads do.",
            above(c.gap("first", RECEIVERS, RANDOM), 0),
        ),
        Finding(
            "Writing facts anew finds the planted one more often than each control does.",
            beats(c, "first", RESAMPLING, [*ROLES]),
            note=f"{c.value('first', RESAMPLING, '.1%')}; {c.value('first', FORCED, '.1%')}",
        ),
        Finding(
            "Receiver heads and suppression agree on which sentences matter.",
            above(c.value("agreement", RECEIVERS, ".2f"), 0),
            note=", ".join(f"{name} {c.mean(name, 'agreement'):.2f}" for name in [*ROLES]),
        ),
        Finding(
            "Resampling and suppression agree on which facts matter.",
            above(c.value("agreement", RESAMPLING, ".2f"), 0),
            note=f"forced answers {c.mean(FORCED, 'agreement'):.2f}",
        ),
        Finding(
            "Receiver heads and resampling agree on which facts matter.",
            above(c.value("resampled", RECEIVERS, ".2f"), 0),
            note=", ".join(f"{name} {c.mean(name, 'resampled'):.2f}" for name in [FORCED, *ROLES]),
        ),
        describe(
            "The receiver heads, as layer.head, best first.",
            ", ".join(f"{layer}.{head}" for layer, head in heads.heads),
        ),
    ]
