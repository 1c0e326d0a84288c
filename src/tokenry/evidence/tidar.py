"""Does a model that has learned to guess write the same text with fewer forward passes, and as good a text as before?

The model is the reasoner of the zoo, taught to guess as well; its twin has had the same lessons without guessing.
Guesses of other kinds go through the very same rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import InputError
from ..data.problems import Arithmetic, draw_problems
from ..decode.speculation.drafters import NGramDrafter, PromptLookupDrafter
from ..decode.speculation.loop import Speculation
from ..decode.speculation.self_draft import SelfDrafting
from ..decode.speculation.verifiers import VERIFIERS
from ..decode.tidar import TiDAR
from ..measure.claims import (
    Contrast,
    Finding,
    above,
    all_of,
    at_least,
    loses_at_most,
    within,
)
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import Interval, bootstrap_statistic, paired_bootstrap
from ..measure.task import Arm
from ..measure.tasks.self_drafting import OtherGuesses, Plan, SelfDraftingTask, bigram, random_tokens, repeat
from ..measure.tasks.speculation import EFFICIENCY
from ..models.load import load
from ..zoo.reasoner import LEVELS, examples
from ..zoo.tidar import solved

__all__ = ["build"]

PLAIN, METHOD, HALF, NONE = "plain", "tidar", "tidar, beta 0.5", "tidar, beta 0"
RANDOM, REPEAT, BIGRAM = "random guesses", "the last token again", "bigram guesses"
LOOKUP, TREE = "prompt lookup", "n-gram tree"
TWIN, REASONER = "twin", "reasoner"
PLAIN_SAMPLED, SAMPLED = "plain, sampled", "tidar, sampled"
TWINS = {TWIN: "zoo/tidar-twin", REASONER: "zoo/reasoner"}
LOSSLESS = (METHOD, RANDOM, REPEAT, BIGRAM, LOOKUP, TREE)
TEMPERATURE = 0.8
WANTED, CLOSE = 1.4, 0.01  # tokens per forward; loss of accuracy
MARGIN = 0.03  # of accuracy, where few problems are decoded
LESSONS, MANY = 2000, 960  # texts for the bigrams, problems for accuracy


@experiment("tidar", TiDAR, model="zoo/tidar", samples=140, seeds=(0, 1, 2), quick=2, limit=320)
def build(run: Run[TiDAR]) -> Design:
    """Greedy decoding by the model's own guesses and by others, and sampling.

    What `method` sets of block size and mask token replaces what the model learned; beta is varied anyway.
    """
    model, tokenizer, method = run.model, run.tokenizer, run.method or TiDAR()
    twins = {name: load(source, model.dtype, model.device).model for name, source in TWINS.items()}
    if model.config.get_text_config().vocab_size != twins[TWIN].config.vocab_size:
        raise InputError("this model has other tokens than its twin; tidar is measured with --model zoo/tidar")
    plan, many = SelfDrafting.of(model, method.mask_token_id, method.block_size), run.size(MANY, 40)
    problems = draw_problems(Arithmetic(), run.count, levels=LEVELS)
    return Design(
        task=SelfDraftingTask(tokenizer, problems, once=run.seeds[0]),
        arms=make_arms(model, tokenizer, plan, twins),
        baseline=PLAIN,
        models=twins,
        statistics=(EFFICIENCY,),
        facts={"solve": partial(solved, tokenizer=tokenizer, count=many), "twins": twins, "rows": rows_of(plan)},
        notes=f"Blocks of {plan.block_size}: a forward has {rows_of(plan)} rows, and checks {plan.block_size - 1} "
        f"guesses. Greedy arms run once, sampled ones (temperature {TEMPERATURE}) with every seed. Guesses of "
        f"other kinds go through the same rows; bigrams are those of {LESSONS} lessons. Prompt lookup checks as many "
        f"guesses in a chain, the n-gram tree has {tree_width(plan) * (plan.block_size - 1)} nodes. The twin had the "
        "same batches and weights to start from, and learned next tokens alone; both were trained once, so that the "
        "intervals do not contain the variance of training. Accuracy against it is of "
        f"{many} problems.",
        tried="Against the gap to the twin, on dev problems, neither helped: a second phase of training, and a larger "
        "weight of the next tokens in it (alpha 4).",
    )


def rows_of(plan: SelfDrafting) -> int:
    """Rows of a forward: the draft and its replicas."""
    return plan.block_size * (1 + plan.block_size)


def tree_width(plan: SelfDrafting) -> int:
    """Guesses at each depth of a tree that has about as many rows."""
    return (rows_of(plan) - 1) // (plan.block_size - 1)


def make_arms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: SelfDrafting,
    twins: dict[str, PreTrainedModel],
) -> list[Arm]:
    """The model alone and with its own guesses, guesses of other kinds, other drafters, and the model's relatives."""
    size, mask, depth = plan.block_size, plan.mask_token_id, plan.block_size - 1
    lessons = (ids for ids, _ in islice(examples(tokenizer, seed=2), LESSONS))
    guesses = {
        RANDOM: random_tokens(model.config.get_text_config().vocab_size),
        REPEAT: repeat,
        BIGRAM: bigram(lessons, model.config.get_text_config().vocab_size),
    }
    drafters = {
        LOOKUP: Speculation(PromptLookupDrafter(), VERIFIERS["single"], 1, depth),
        TREE: Speculation(NGramDrafter(), VERIFIERS["greedy"], tree_width(plan), depth),
    }
    trust = {METHOD: 1.0, HALF: 0.5, NONE: 0.0}
    forwards = {"block_size": size, "beta": 1.0, "temperature": TEMPERATURE}
    return [
        Arm(PLAIN, role="plain", apply=Plan(model)),
        *(
            Arm(name, setting={"block_size": size, "beta": beta}, apply=Plan(model, SelfDrafting(mask, size, beta)))
            for name, beta in trust.items()
        ),
        *(
            Arm(
                name,
                role="control",
                setting={"block_size": size},
                apply=Plan(model, OtherGuesses(mask, size, guess=guess)),
            )
            for name, guess in guesses.items()
        ),
        *(
            Arm(
                name,
                role="control",
                setting={"num_drafts": s.num_drafts, "draft_length": depth},
                apply=Plan(model, s),
            )
            for name, s in drafters.items()
        ),
        *(Arm(name, role="control", setting={"model": TWINS[name]}, apply=Plan(twin)) for name, twin in twins.items()),
        Arm(
            PLAIN_SAMPLED,
            role="control",
            setting={"temperature": TEMPERATURE},
            apply=Plan(model, None, TEMPERATURE),
        ),
        Arm(SAMPLED, setting=forwards, apply=Plan(model, plan, TEMPERATURE)),
    ]


# --- the verdict -----------------------------------------------------------------------------------------------------


@build.findings
def findings(c: Comparison, solve: Callable[..., list], twins: dict[str, PreTrainedModel], rows: int) -> list[Finding]:
    """Fewer forwards, the worth of the guesses, the price of learning them, sampling, trust and time. That greedy text
    stays the same whoever guesses is what tests say."""
    efficiency, better = (
        {name: c.value(EFFICIENCY.name, name, ".2f") for name in c.arms},
        partial(beats, c, EFFICIENCY.name),
    )
    trusted = [c.gap("accuracy", name, METHOD) for name in (HALF, NONE)]
    return [
        Finding(
            f"greedy decoding gives at least {WANTED} tokens per forward",
            at_least(efficiency[METHOD], WANTED),
            main=True,
            note=f"guesses that came out, by depth: {_by_depth(c, METHOD)}",
        ),
        Finding(
            "its guesses are better than random ones, repetition and bigrams", better(METHOD, [RANDOM, REPEAT, BIGRAM])
        ),
        Finding(
            "it needs fewer forwards than prompt lookup, and than an n-gram tree of as many rows",
            better(METHOD, [LOOKUP, TREE]),
        ),
        _price(c, solve, twins),
        Finding(
            f"sampled text too has at least {WANTED} tokens per forward, and is as often right",
            all_of(
                at_least(efficiency[SAMPLED], WANTED), loses_at_most(c.gap("accuracy", SAMPLED, PLAIN_SAMPLED), MARGIN)
            ),
        ),
        Finding(
            "accuracy hardly depends on the trust",
            all_of(*(within(gap, MARGIN) for gap in trusted)),
            note="; ".join(str(efficiency[name]) for name in (HALF, NONE)),
        ),
        _seconds(c, rows),
    ]


def _price(c: Comparison, solve: Callable[..., list], twins: dict[str, PreTrainedModel]) -> Finding:
    """Greedy accuracy token by token, which is that of drafted text, on more problems than are drafted."""
    models = {METHOD: c.experiment.arms[0].apply.model, **twins}
    right = {name: np.array(solve(model), float) for name, model in models.items()}
    loss = Contrast(paired_bootstrap(right[METHOD], right[TWIN]), f"accuracy, {METHOD} - {TWIN}", "+.3f")
    return Finding(
        f"learning to guess costs at most {CLOSE} of accuracy against its twin",
        loses_at_most(loss, CLOSE),
        note=", ".join(f"{name} {values.mean():.3f}" for name, values in right.items()),
    )


def _seconds(c: Comparison, rows: int) -> Finding:
    """Times plain decoding, for a token and for a forward; medians over problems, whose runs are interleaved."""

    def times(name: str, unit: str) -> Interval:
        each = [c.values(n, "seconds") / c.values(n, unit) for n in (PLAIN, name)]
        faster = each[0] / each[1]
        return bootstrap_statistic(lambda pick: float(np.nanmedian(faster[pick])), len(faster))

    speed = {name: Contrast(times(name, "tokens"), f"speed, {name} / {PLAIN}", ".2f") for name in LOSSLESS}
    step = 1 / times(METHOD, "forward_passes").mean
    return Finding(
        "on this CPU it is faster than token by token",
        above(speed[METHOD], 1),
        note=f"a step with {rows} rows takes {step:.2f} times one of plain decoding; "
        + ", ".join(f"{name} {one.shown}" for name, one in speed.items() if name != METHOD),
    )


def _by_depth(c: Comparison, arm: str) -> str:
    met = np.array([p for detail in c.details(arm) for p in detail.get("positions", ())])
    return ", ".join(f"{met[met[:, 0] == depth, 1].mean():.3f}" for depth in range(met[:, 0].max() + 1))
