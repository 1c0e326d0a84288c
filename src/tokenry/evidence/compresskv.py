"""Does it matter which heads choose what the cache keeps? CompressKV against the heads it leaves out."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, cast

from transformers import PreTrainedModel

from ..measure.claims import Check, Finding, above, all_of
from ..measure.experiment import Design, Run, experiment
from ..measure.task import Arm
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


@experiment("compresskv", CompressKV, samples=60, quick=2)
def build(run: Run[CompressKV]) -> Design:
    """Needle prompts of about 500 tokens; every choice of heads at three cache budgets.

    `method` has settings to compare as well; its profile is used for all arms.
    """
    shared = {} if run.method is None else {"profile": run.method.profile}
    arms = [Arm(FULL, role="plain"), *(arm for budget in BUDGETS for arm in _arms(budget, shared))]
    if (method := run.method) is not None:
        setting = method.model_dump(mode="json", exclude={"profile"})
        arms.append(Arm("as given", setting=setting, apply=lambda model, draw: method(model)))
    return Design(
        task=NeedleTask(run.model, run.tokenizer, run.count),
        arms=arms,
        baseline=FULL,
        notes="Five digits hidden in about 500 tokens of filler; the profile was made from other prompts. "
        "Random heads and shuffled layer errors are drawn anew for every prompt.",
    )


def _arms(budget: int, shared: dict[str, Any]) -> list[Arm]:
    def arm(what: str, role: Any, heads: str, adaptive: bool = False) -> Arm:
        setting = {"heads": heads, "adaptive": adaptive}

        def opens(model: PreTrainedModel, draw: int) -> CacheCutter:
            return CompressKV(budget=budget, seed=draw, **setting, **shared)(model)

        return Arm(_name(budget, what), role=role, setting={"budget": budget, **setting}, apply=opens)

    def recent(model: PreTrainedModel, draw: int) -> CacheCutter:
        return CacheCutter(model, FirstLast(), dict.fromkeys(full_attention_layers(model), budget))

    def shuffled(model: PreTrainedModel, draw: int) -> CacheCutter:
        profile = shared.get("profile") or shipped_profile()
        measured = cast(tuple[float, ...], profile.error)
        error = random.Random(draw).sample(measured, len(measured))
        wrong = profile.model_copy(update={"error": tuple(error)})
        return CompressKV(budget=budget, profile=wrong)(model)

    made_up, sinks = {"budget": budget, "error": "shuffled"}, {"budget": budget, "sinks": FirstLast().sinks}
    return [
        arm(ADAPTIVE, "method", "retrieval", adaptive=True),
        arm(UNIFORM, "method", "retrieval"),
        arm(ALL, "control", "all"),
        arm(RANDOM, "control", "random"),
        arm(LOWEST, "control", "lowest"),
        Arm(_name(budget, SHUFFLED), role="control", setting=made_up, apply=shuffled),
        Arm(_name(budget, RECENT), role="control", setting=sinks, apply=recent),
    ]


def _name(budget: int, what: str) -> str:
    return f"{budget}: {what}"


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """Which heads, which layers: each at every budget."""
    return [
        Finding(
            "Retrieval heads with a budget for each layer keep more of the answer than all heads together.",
            all_of(*(_more(c, budget, ADAPTIVE, ALL) for budget in BUDGETS)),
            main=True,
        ),
        Finding("With equal budgets they keep more, too.", all_of(*(_more(c, b, UNIFORM, ALL) for b in BUDGETS))),
        Finding(
            "Retrieval heads keep more than random heads, and random heads more than the lowest ones.",
            all_of(*(_more(c, b, *pair) for b in BUDGETS for pair in ((UNIFORM, RANDOM), (RANDOM, LOWEST)))),
        ),
        Finding(
            "They keep more than the first and the last tokens do.",
            all_of(*(_more(c, budget, UNIFORM, RECENT) for budget in BUDGETS)),
        ),
        Finding(
            "Layer budgets keep more of the answer than equal budgets, and than the same budgets given to other "
            "layers.",
            all_of(*(_more(c, b, ADAPTIVE, other) for b in BUDGETS for other in (UNIFORM, SHUFFLED))),
        ),
    ]


def _more(c: Comparison, budget: int, better: str, worse: str) -> Check:
    """Whether `better` has the lower negative log-likelihood of the answer."""
    return above(c.gap("answer_nll", _name(budget, worse), _name(budget, better)), 0)
