"""Does it matter which heads choose what the cache keeps? CompressKV against the heads it leaves out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..measure.task import Experiment, Finding, Subject
from ..measure.tasks.needle import NeedleTask
from ..models.anatomy import full_attention_layers
from ..select.compresskv import CompressKV
from ..select.cutters.cache import CacheCutter
from ..select.heads.profile import shipped_profile
from ..select.keep.controls import FirstLast

if TYPE_CHECKING:
    from ..measure.compare import Comparison

__all__ = ["build"]

BUDGETS = (40, 64, 128)
FULL = "full cache"
ADAPTIVE, UNIFORM, SHUFFLED, ALL, RANDOM, LOWEST, RECENT = (
    "retrieval heads, layer budgets",
    "retrieval heads",
    "retrieval heads, shuffled layer budgets",
    "all heads",
    "random heads",
    "lowest heads",
    "sink and recent",
)
METHODS = (ADAPTIVE, UNIFORM)


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    method: CompressKV | None = None,
) -> Experiment:
    """Needle prompts of about 500 tokens; every choice of heads at three cache budgets.

    Args:
        method: settings to compare as well; its profile is used for all subjects.
    """
    shared = {} if method is None else {"profile": method.profile}
    subjects = [Subject(FULL, "plain")]
    for budget in BUDGETS:
        subjects += _subjects(budget, shared)
    if method is not None:
        setting = method.model_dump(mode="json", exclude={"profile"})
        subjects.append(Subject("as given", "method", setting, lambda model, draw: method(model)))
    return Experiment(
        slug=CompressKV.slug,
        claim=CompressKV.claim,
        task=NeedleTask(model, tokenizer, samples or 60),
        subjects=subjects,
        baseline=FULL,
        judge=judge,
        seeds=tuple(seeds or (0,)),
        notes="Five digits hidden in about 500 tokens of filler; the profile was made from other prompts. "
        "Random heads and shuffled layer errors are drawn anew for every prompt.",
    )


def _subjects(budget: int, shared: dict[str, Any]) -> list[Subject]:
    made = [
        _subject(budget, ADAPTIVE, "method", {"heads": "retrieval", "adaptive": True}, shared),
        _subject(budget, UNIFORM, "method", {"heads": "retrieval", "adaptive": False}, shared),
        _subject(budget, ALL, "control", {"heads": "all", "adaptive": False}, shared),
        _subject(budget, RANDOM, "control", {"heads": "random", "adaptive": False}, shared),
        _subject(budget, LOWEST, "control", {"heads": "lowest", "adaptive": False}, shared),
    ]

    def recent(model: PreTrainedModel, draw: int) -> CacheCutter:
        return CacheCutter(model, FirstLast(), dict.fromkeys(full_attention_layers(model), budget))

    def shuffled(model: PreTrainedModel, draw: int) -> CacheCutter:
        profile = shared.get("profile") or shipped_profile()
        error = random.Random(draw).sample(profile.error, len(profile.error))
        wrong = profile.model_copy(update={"error": tuple(error)})
        return CompressKV(budget=budget, profile=wrong)(model)

    sinks = {"budget": budget, "sinks": FirstLast().sinks}
    return [
        *made,
        Subject(_name(budget, SHUFFLED), "control", {"budget": budget, "error": "shuffled"}, shuffled),
        Subject(_name(budget, RECENT), "control", sinks, recent),
    ]


def _subject(budget: int, what: str, role: Any, setting: dict[str, Any], shared: dict[str, Any]) -> Subject:
    def opens(model: PreTrainedModel, draw: int) -> CacheCutter:
        return CompressKV(budget=budget, seed=draw, **setting, **shared)(model)

    return Subject(_name(budget, what), role, {"budget": budget, **setting}, opens)


def _name(budget: int, what: str) -> str:
    return f"{budget}: {what}"


def judge(comparison: Comparison) -> list[Finding]:
    """The claim in three sentences: which heads, which layers, how many bytes."""
    return [_heads_finding(comparison), _layers_finding(comparison), _bytes_finding(comparison)]


def _gain(comparison: Comparison, budget: int, better: str, worse: str) -> tuple[bool, str]:
    """Whether `better` has the lower NLL with an interval above 0, and the numbers."""
    gap = comparison.difference(_name(budget, worse), _name(budget, better), "answer_nll")
    numbers = f"{worse} - {better} {gap:+.3f} nats"
    return gap.low > 0, numbers


def _heads_finding(comparison: Comparison) -> Finding:
    holds, numbers = False, []
    for budget in BUDGETS:
        top, first = _gain(comparison, budget, UNIFORM, RANDOM)
        bottom, second = _gain(comparison, budget, RANDOM, LOWEST)
        holds = holds or (top and bottom)
        numbers.append(f"budget {budget}: {first}; {second}")
    return Finding(
        "At some budget retrieval heads keep more of the answer than random heads, and random heads more than the "
        "lowest ones.",
        holds,
        ". ".join(numbers),
    )


def _layers_finding(comparison: Comparison) -> Finding:
    holds, numbers = True, []
    for budget in (b for b in BUDGETS if b >= 64):
        equal, first = _gain(comparison, budget, ADAPTIVE, UNIFORM)
        wrong, second = _gain(comparison, budget, ADAPTIVE, SHUFFLED)
        holds = holds and equal and wrong
        numbers.append(f"budget {budget}: {first}; {second}")
    return Finding(
        "From 64 entries on, layer budgets keep more of the answer than equal budgets, and than the same budgets given "
        "to other layers.",
        holds,
        ". ".join(numbers),
    )


def _bytes_finding(comparison: Comparison) -> Finding:
    tokens = np.array([detail["prompt_tokens"] for detail in comparison.details(FULL)], float)
    tokens = tokens.reshape(len(comparison.experiment.seeds), -1).mean(0)
    column = comparison.values(FULL, "cache_bytes") / tokens
    worst = {
        b: max(float(np.abs(comparison.values(_name(b, w), "cache_bytes") / (b * column) - 1).max()) for w in METHODS)
        for b in BUDGETS
    }
    return Finding(
        "The cache after the prompt is within 1 % of the budget.",
        max(worst.values()) <= 0.01,
        ", ".join(f"budget {b}: off by at most {share:.2%}" for b, share in worst.items()),
    )
