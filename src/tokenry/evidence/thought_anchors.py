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

SUPPRESSION, RECEIVERS = "suppression", "receiver heads"
PLACE, RANDOM, SHUFFLED = "place alone", "random heads", "suppression, shuffled sentences"
ROUTES = {SUPPRESSION: "suppression", RECEIVERS: "receivers", PLACE: "place", RANDOM: "random", SHUFFLED: "shuffled"}
ROLES: dict[str, Role] = {PLACE: "plain", RANDOM: "control", SHUFFLED: "control"}


@experiment("thought-anchors", ThoughtAnchors, samples=24, batch=1, quick=6)
def build(run: Run[ThoughtAnchors]) -> Design:
    """Texts of eight facts, one of which later sentences come back to; receiver heads are those of other prose."""
    method = run.method or ThoughtAnchors()
    heads = heads_of_prose(run.model, run.tokenizer, run.size(12, 4), method)
    arms = [Arm(name, method, ROLES.get(name, "method"), apply=route) for name, route in ROUTES.items()]
    return Design(
        task=PlantedTask(run.model, run.tokenizer, run.count, heads, method),
        arms=arms,
        baseline=PLACE,
        facts={"heads": heads},
        tried="The first six texts were measured once; after that only the number of texts was cut, for time.",
        notes="Receiver heads are chosen on documentation of Python's libraries, not on the texts that are measured. "
        "Random heads are drawn anew for each text from the others behind layer 0. The place alone takes the fact "
        "nearest to the sentence that comes back to one. Resampling is not measured here: its cost is that of "
        "thousands of continuations.",
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
            "Receiver heads and suppression agree on which sentences matter.",
            above(c.value("agreement", RECEIVERS, ".2f"), 0),
            note=", ".join(f"{name} {c.mean(name, 'agreement'):.2f}" for name in [*ROLES]),
        ),
        describe(
            "The receiver heads, as layer.head, best first.",
            ", ".join(f"{layer}.{head}" for layer, head in heads.heads),
        ),
    ]
