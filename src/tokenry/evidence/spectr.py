"""How many forward passes do drafts save, and does the text stay the model's own?

The pair is a model and a small copy of it. Verifiers are compared at the same cost: trees of the same size, with one
draft for comparison. What any verifier could reach on the same drafts stands beside each of them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..decode.spectr import Spectr
from ..decode.speculation.drafters import ModelDrafter
from ..decode.speculation.loop import Speculation
from ..measure.compare import Comparison
from ..measure.statistics import Interval, paired_bootstrap
from ..measure.task import Experiment, Finding, Subject
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
CONTEXT, REPEATS = 200, 5


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    method: Spectr | None = None,
) -> Experiment:
    """Plain sampling, one draft, and every verifier with several, all at temperature 1.

    Args:
        samples: test problems; default 60.
        method: what it sets of drafter, num_drafts and draft_length replaces the defaults zoo/drafter, 4 and 4.
    """
    given = {**DEFAULT, **(method.model_dump(exclude_unset=True, include=set(DEFAULT)) if method else {})}
    plans = {name: plan(model, tokenizer, name, given) for name in VERIFIERS}
    prefix = uncertain_prefix(model, tokenizer)
    task = SpeculationTask(model, tokenizer, samples or 60, DRAWS, prefix)
    subjects = [Subject(PLAIN, "plain")]
    for name, (settings, speculation) in plans.items():
        role = "control" if name in (SINGLE, NAIVE) else "method"
        subjects.append(Subject(name, role, settings.model_dump(mode="json"), speculation))
    drafter = plans[SINGLE][1].drafter
    own = {"drafter": drafter.model} if type(drafter) is ModelDrafter else {}  # other drafters are in the settings
    share = sum(one.num_parameters() for one in own.values()) / model.num_parameters()
    return Experiment(
        slug=Spectr.slug,
        claim=Spectr.claim,
        task=task,
        subjects=subjects,
        baseline=PLAIN,
        judge=partial(judge, distribution=continuation_distribution(model, prefix), share=share, given=given),
        seeds=tuple(seeds or (0,)),
        batch=1,
        models=own,
        notes=f"Temperature 1. The draft model has {share:.1%} of the target's parameters. The trees of all verifiers "
        f"but `single` have {given['num_drafts']} drafts at each of {given['draft_length']} depths at most. Without "
        "replacement and with the greedy draft they are spread over the nodes of a depth where they are worth most. "
        f"{DRAWS} continuations of {tokenizer.decode(prefix)!r} per subject are tested against their exact "
        "distribution. Seconds are of this pair on one CPU, where a forward pass of either model is mostly overhead.",
        statistics=(EFFICIENCY,),
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


def by_depth(comparison: Comparison, subject: str) -> str:
    """Acceptance and ceiling at each depth."""
    rows = np.array([p for d in comparison.details(subject) for p in d.get("positions", ())], float)
    met = [rows[rows[:, 0] == depth] for depth in range(int(rows[:, 0].max()) + 1)]
    return f"{subject} " + ", ".join(f"{m[:, 1].mean():.3f} of {m[:, 2].mean():.3f}" for m in met)


def distribution_tests(comparison: Comparison, distribution: dict) -> dict[str, dict]:
    """The chi-square test of every subject."""
    found = {}
    for name in comparison.subjects:
        drawn = [new for detail in comparison.details(name) for new in detail.get("continuations", ())]
        found[name] = chi_square(drawn, distribution)
    return found


def judge(comparison: Comparison, distribution: dict, share: float, given: dict) -> list[Finding]:
    """Fewer forwards, the order of the verifiers, the distribution, the answers, and what the speed would be
    elsewhere."""
    efficiency = {name: comparison.interval(name, EFFICIENCY.name) for name in VERIFIERS}
    over = partial(comparison.difference, name=EFFICIENCY.name)
    tests = distribution_tests(comparison, distribution)
    below = {name: comparison.mean(name, "ceiling") - comparison.mean(name, "acceptance") for name in VERIFIERS}
    drafted = np.mean([comparison.values(name, "accuracy") for name in VERIFIERS], axis=0)
    accuracy = paired_bootstrap(drafted, comparison.values(PLAIN, "accuracy"))
    return [
        Finding(
            f"one draft of {given['draft_length']} tokens gives at least {WANTED} tokens per forward of the target",
            efficiency[SINGLE].mean >= WANTED,
            "tokens per forward: " + "; ".join(f"{name} {e:.2f}" for name, e in efficiency.items()),
        ),
        Finding(
            "several drafts with K-SEQ give more than one",
            over(KSEQ, SINGLE).low > 0,
            f"kseq - single: {over(KSEQ, SINGLE):.3f}; rrs - single: {over(RRS, SINGLE):.3f}",
        ),
        Finding(
            "the greedy draft with its optimal verifier gives more than K-SEQ",
            over(GREEDY, KSEQ).low > 0,
            f"greedy - kseq: {over(GREEDY, KSEQ):.3f}; rrs-without - kseq: {over(WITHOUT, KSEQ):.3f}",
        ),
        Finding(
            f"no verifier is more than {TOLERANCE} above the ceiling of its drafts, and the greedy one reaches it",
            all(gap > -TOLERANCE for gap in below.values()) and below[GREEDY] < TOLERANCE,
            "acceptance of ceiling, by depth: " + "; ".join(by_depth(comparison, name) for name in VERIFIERS),
        ),
        Finding(
            f"the text keeps the model's distribution: no chi-square test has p below {REJECTED}",
            all(test["p"] >= REJECTED for test in tests.values()),
            "p (statistic / degrees of freedom): "
            + "; ".join(f"{n} {t['p']:.3f} ({t['statistic']:.1f} / {t['freedom']})" for n, t in tests.items()),
        ),
        Finding(
            "the answers are as often right as without drafts: the interval of the difference contains 0",
            not accuracy.excludes_zero,
            f"all with drafts - plain: {accuracy:.3f}; "
            + "; ".join(f"{name} {comparison.mean(name, 'accuracy'):.3f}" for name in comparison.subjects),
        ),
        elsewhere(comparison, efficiency, share, given),
    ]


def elsewhere(comparison: Comparison, efficiency: dict[str, Interval], share: float, given: dict) -> Finding:
    """The cost model, with forwards that cost as on memory-bound hardware and as on this CPU; and what was measured."""
    length, tree = given["draft_length"], given["num_drafts"] * given["draft_length"] + 1
    sizes = {SINGLE: length + 1, KSEQ: tree, GREEDY: tree}
    costs = forward_costs(load()[0], [length + 1, tree])
    free, here = (
        {name: speedup(efficiency[name].mean, length, share, verify(size)) for name, size in sizes.items()}
        for verify in (lambda size: 1.0, lambda size: costs[size])
    )
    pace = {name: comparison.values(name, "seconds") / comparison.values(name, "tokens") for name in [PLAIN, *sizes]}
    measured = {name: float(np.nanmedian(pace[PLAIN] / pace[name])) for name in sizes}

    def row(values: dict[str, float]) -> str:
        return ", ".join(f"{name} {value:.2f} x" for name, value in values.items())

    return Finding(
        "where a forward of the tree costs as much as one of a token, more drafts mean more speed",
        free[GREEDY] > free[KSEQ] > free[SINGLE] > 1,
        f"a forward of the draft model is taken to cost {share:.3f} of the target's, its share of the parameters. "
        f"Memory-bound, as large models on a GPU: {row(free)}. Costs of SmolLM2-135M on this CPU "
        f"({length + 1} tokens {costs[length + 1]:.2f}, {tree} tokens {costs[tree]:.2f} of one): {row(here)}. "
        f"Measured with this pair, median over problems: {row(measured)}",
    )
