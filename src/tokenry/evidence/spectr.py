"""How many forward passes do drafts save, and does the text stay the model's own?

The pair is a model and a small copy of it. Verifiers are compared at the same cost: trees of the same size, with one
draft for comparison. What any verifier could reach on the same drafts stands beside each of them.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decode.spectr import Spectr
from ..decode.speculation.drafters import ModelDrafter
from ..decode.speculation.loop import Speculation
from ..measure.claims import (
    Check,
    Contrast,
    Finding,
    above,
    all_of,
    at_least,
    at_most,
    exactly,
    loses_at_most,
)
from ..measure.compare import Comparison
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import bootstrap_statistic, paired_bootstrap
from ..measure.task import Arm
from ..measure.tasks.speculation import (
    EFFICIENCY,
    SpeculationTask,
    chi_square,
    continuation_distribution,
    uncertain_prefix,
)

__all__ = ["build"]

PLAIN, SINGLE, NAIVE, RRS, WITHOUT, KSEQ, GREEDY = "plain", "single", "naive", "rrs", "rrs-without", "kseq", "greedy"
VERIFIERS = (SINGLE, NAIVE, RRS, WITHOUT, KSEQ, GREEDY)
DEFAULT = {"drafter": "zoo/drafter", "num_drafts": 4, "draft_length": 4}
DRAWS = 2000  # continuations for the chi-square test
WANTED = 2.5  # tokens per forward of the target with one draft
REJECTED = 1e-4  # p value below which the distribution would be another one
TOLERANCE = 0.015  # of an acceptance rate
MARGIN = 0.03  # of accuracy that may be lost


@experiment("spectr", Spectr, model="zoo/reasoner", samples=200, quick=2, limit=400)
def build(run: Run[Spectr]) -> Design:
    """Plain sampling, one draft, and every verifier with several, all at temperature 1.

    What `method` sets of drafter, num_drafts and draft_length replaces the defaults zoo/drafter, 4 and 4.
    """
    given = {**DEFAULT, **{name: value for name, value in run.given.items() if name in DEFAULT}}
    model, draws = run.model, run.size(DRAWS, 100)
    plans = {name: plan(model, run.tokenizer, name, given) for name in VERIFIERS}
    prefix = uncertain_prefix(model, run.tokenizer)
    drafter = plans[SINGLE][1].drafter
    own = {"drafter": drafter.model} if type(drafter) is ModelDrafter else {}  # other drafters are in the settings
    share = sum(one.num_parameters() for one in own.values()) / model.num_parameters()
    return Design(
        task=SpeculationTask(model, run.tokenizer, run.count, draws, prefix),
        arms=[
            Arm(PLAIN, role="plain"),
            *(
                Arm(name, settings, "control" if name in (SINGLE, NAIVE) else "method", apply=speculation)
                for name, (settings, speculation) in plans.items()
            ),
        ],
        baseline=PLAIN,
        models=own,
        statistics=(EFFICIENCY,),
        facts={"distribution": continuation_distribution(model, prefix), "length": given["draft_length"]},
        notes=f"Temperature 1. The draft model has {share:.1%} of the target's parameters. The trees of all verifiers "
        f"but `single` have {given['num_drafts']} drafts at each of {given['draft_length']} depths at most. Without "
        "replacement and with the greedy draft they are spread over the nodes of a depth where they are worth most. "
        f"{draws} continuations of {run.tokenizer.decode(prefix)!r} per arm are tested against their exact "
        "distribution. Seconds are of this pair on one CPU, where a forward pass of either model is mostly overhead.",
    )


def plan(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, verifier: str, given: dict
) -> tuple[Spectr, Speculation]:
    """The method with this verifier, and what it stands for on the model."""
    settings = Spectr(**{**given, "verifier": verifier, **({"num_drafts": 1} if verifier == SINGLE else {})})
    return settings, cast(Speculation, settings.plugins(model, tokenizer).speculation)


# --- the verdict ---------------------------------------------------------------------------------------------------


@build.findings
def findings(c: Comparison, distribution: dict, length: int) -> list[Finding]:
    """Fewer forwards, the order of the verifiers, the distribution, the answers, and the speed."""
    efficiency = {name: c.value(EFFICIENCY.name, name, ".2f") for name in VERIFIERS}
    drafted = np.mean([c.values(name, "accuracy") for name in VERIFIERS], axis=0)
    accuracy = Contrast(paired_bootstrap(drafted, c.values(PLAIN, "accuracy")), "accuracy, all with drafts - plain")

    def over(first: str, second: str) -> Contrast:
        return c.gap(EFFICIENCY.name, first, second)

    return [
        Finding(
            f"one draft of {length} tokens gives at least {WANTED} tokens per forward of the target",
            at_least(efficiency[SINGLE], WANTED),
            main=True,
            note="; ".join(f"{name} {found.shown}" for name, found in efficiency.items() if name != SINGLE),
        ),
        Finding(
            "several drafts with K-SEQ give more than one", above(over(KSEQ, SINGLE), 0), note=str(over(RRS, SINGLE))
        ),
        Finding(
            "the greedy draft with its optimal verifier gives more than K-SEQ",
            above(over(GREEDY, KSEQ), 0),
            note=str(over(WITHOUT, KSEQ)),
        ),
        Finding(
            f"no verifier is more than {TOLERANCE} above the ceiling of its drafts, and the greedy one reaches it",
            all_of(at_most(_missing(c, GREEDY), TOLERANCE), *(at_least(_missing(c, n), -TOLERANCE) for n in VERIFIERS)),
            note="acceptance of ceiling, by depth: " + "; ".join(_by_depth(c, name) for name in VERIFIERS),
        ),
        Finding("the text keeps the model's distribution, by chi-square tests", _same_distribution(c, distribution)),
        Finding(
            "the answers are as often right as without drafts",
            loses_at_most(accuracy, MARGIN),
            note="; ".join(f"{name} {c.mean(name, 'accuracy'):.3f}" for name in c.arms),
        ),
        Finding(
            "on this CPU several drafts are faster than token by token",
            all_of(*(above(_speed(c, name), 1) for name in (KSEQ, GREEDY))),
            note=str(_speed(c, SINGLE)),
        ),
    ]


def _missing(c: Comparison, arm: str) -> Contrast:
    """How far the acceptance of a verifier is below the ceiling of its drafts."""
    return Contrast(paired_bootstrap(c.values(arm, "ceiling"), c.values(arm, "acceptance")), f"{arm} below its ceiling")


def _by_depth(c: Comparison, arm: str) -> str:
    """Acceptance and ceiling at each depth."""
    rows = np.array([p for d in c.details(arm) for p in d.get("positions", ())], float)
    met = [rows[rows[:, 0] == depth] for depth in range(int(rows[:, 0].max()) + 1)]
    return f"{arm} " + ", ".join(f"{m[:, 1].mean():.3f} of {m[:, 2].mean():.3f}" for m in met)


def _same_distribution(c: Comparison, distribution: dict) -> Check:
    """The smallest p value of all arms."""
    found = {}
    for name in c.arms:
        drawn = [new for detail in c.details(name) for new in detail.get("continuations", ())]
        found[name] = chi_square(drawn, distribution)
    least = min(found, key=lambda name: found[name]["p"])
    test = found[least]
    shown = f"smallest p, of {least} ({test['statistic']:.1f} / {test['freedom']})"
    return at_least(exactly(test["p"], shown, ".2g"), REJECTED)


def _speed(c: Comparison, arm: str) -> Contrast:
    """Times plain decoding, for a token; the median over problems, whose runs are interleaved."""
    pace = [c.values(name, "seconds") / c.values(name, "tokens") for name in (PLAIN, arm)]
    faster = pace[0] / pace[1]
    faster = faster[~np.isnan(faster)]  # continuations have no time
    found = bootstrap_statistic(lambda pick: float(np.median(faster[pick])), len(faster))
    return Contrast(found, f"speed, {arm} / {PLAIN}", ".2f")
