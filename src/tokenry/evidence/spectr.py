"""How many forward passes do drafts save, and does the text stay the model's own?

The pair is a model and a small copy of it. Verifiers are compared at the same cost: trees of the same size, with one
draft for comparison. What any verifier could reach on the same drafts stands beside each of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

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
    describe,
    exactly,
    loses_at_most,
)
from ..measure.compare import Comparison
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import paired_bootstrap
from ..measure.task import Arm
from ..measure.tasks.speculation import (
    EFFICIENCY,
    SpeculationTask,
    chi_square,
    continuation_distribution,
    uncertain_prefix,
)
from ..models.load import load

__all__ = ["build"]

PLAIN, SINGLE, NAIVE, RRS, WITHOUT, KSEQ, GREEDY = "plain", "single", "naive", "rrs", "rrs-without", "kseq", "greedy"
VERIFIERS = (SINGLE, NAIVE, RRS, WITHOUT, KSEQ, GREEDY)
DEFAULT = {"drafter": "zoo/drafter", "num_drafts": 4, "draft_length": 4}
DRAWS = 2000  # continuations for the chi-square test
WANTED = 2.5  # tokens per forward of the target with one draft
REJECTED = 1e-4  # p value below which the distribution would be another one
TOLERANCE = 0.015  # of an acceptance rate
MARGIN = 0.03  # of accuracy that may be lost
CONTEXT, REPEATS = 200, 5


@experiment("spectr", Spectr, model="zoo/reasoner", samples=60, quick=2, limit=400)
def build(run: Run) -> Design:
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
        task=SpeculationTask(model, run.tokenizer, run.samples, draws, prefix),
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
        facts={"distribution": continuation_distribution(model, prefix), "share": share, "given": given},
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
    return settings, settings.plugins(model, tokenizer).speculation


# --- what would be gained elsewhere --------------------------------------------------------------------------------


@torch.no_grad()
def forward_costs(model: PreTrainedModel, counts: Sequence[int]) -> dict[int, float]:
    """Time of a forward of so many new tokens after CONTEXT others, as multiples of that of one; best of REPEATS."""
    ids = torch.full((1, CONTEXT), 5, device=model.device)
    best = dict.fromkeys([1, *counts], float("inf"))
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache, use_cache=True)
    for _ in range(REPEATS):
        for count in best:
            start = time.perf_counter()
            model(ids[:, :count], past_key_values=cache, use_cache=True)
            best[count] = min(best[count], time.perf_counter() - start)
            cache.crop(-count)
    return {count: seconds / best[1] for count, seconds in best.items()}


def speedup(efficiency: float, length: int, draft: float, verify: float) -> float:
    """Speed against plain decoding, where a forward of the draft model costs `draft` and one of the tree `verify`
    forwards of the target."""
    return efficiency / (length * draft + verify)


# --- the verdict ---------------------------------------------------------------------------------------------------


@build.findings
def findings(c: Comparison, distribution: dict, share: float, given: dict) -> list[Finding]:
    """Fewer forwards, the order of the verifiers, the distribution, the answers, and what the speed would be
    elsewhere."""
    efficiency = {name: c.value(EFFICIENCY.name, name, ".2f") for name in VERIFIERS}
    drafted = np.mean([c.values(name, "accuracy") for name in VERIFIERS], axis=0)
    accuracy = Contrast(paired_bootstrap(drafted, c.values(PLAIN, "accuracy")), "accuracy, all with drafts - plain")

    def over(first: str, second: str) -> Contrast:
        return c.gap(EFFICIENCY.name, first, second)

    return [
        Finding(
            f"one draft of {given['draft_length']} tokens gives at least {WANTED} tokens per forward of the target",
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
        _elsewhere(c, share, given),
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


def _elsewhere(c: Comparison, share: float, given: dict) -> Finding:
    """The cost model, with forwards that cost as on memory-bound hardware and as on this CPU; and what was measured."""
    length, tree = given["draft_length"], given["num_drafts"] * given["draft_length"] + 1
    sizes = {SINGLE: length + 1, KSEQ: tree, GREEDY: tree}
    costs = forward_costs(load()[0], [length + 1, tree])
    free, here = (
        {name: speedup(c.mean(name, EFFICIENCY.name), length, share, verify(size)) for name, size in sizes.items()}
        for verify in (lambda size: 1.0, lambda size: costs[size])
    )
    pace = {name: c.values(name, "seconds") / c.values(name, "tokens") for name in [PLAIN, *sizes]}
    measured = {name: float(np.nanmedian(pace[PLAIN] / pace[name])) for name in sizes}

    def row(values: dict[str, float]) -> str:
        return ", ".join(f"{name} {value:.2f} x" for name, value in values.items())

    return describe(
        "the speed that follows where a forward of the tree costs as much as one of a token, and the speed here",
        f"a forward of the draft model is taken to cost {share:.3f} of the target's, its share of the parameters. "
        f"Memory-bound, as large models on a GPU: {row(free)}. Costs of SmolLM2-135M on this CPU "
        f"({length + 1} tokens {costs[length + 1]:.2f}, {tree} tokens {costs[tree]:.2f} of one): {row(here)}. "
        f"Measured with this pair, median over problems: {row(measured)}",
    )
