"""Does a model that has learned to guess write the same text with fewer forward passes, and as good a text as before?

The model is the reasoner of the zoo, taught to guess as well; its twin has had the same lessons without guessing.
Guesses of other kinds go through the very same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from ..measure.compare import Comparison
from ..measure.statistics import Interval, paired_bootstrap
from ..measure.task import Experiment, Finding, Subject
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
LESSONS, MANY = 2000, 960  # texts for the bigrams, problems for accuracy


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    method: TiDAR | None = None,
) -> Experiment:
    """Greedy decoding by the model's own guesses and by others, and sampling.

    Args:
        samples: test problems; default 80.
        method: what it sets of block size and mask token replaces what the model learned; beta is varied anyway.
    """
    twins = {name: load(source, model.dtype, model.device).model for name, source in TWINS.items()}
    if model.config.get_text_config().vocab_size != twins[TWIN].config.vocab_size:
        raise InputError("this model has other tokens than its twin; tidar is measured with --model zoo/tidar")
    method, seeds = method or TiDAR(), tuple(seeds or (0, 1, 2))
    plan = SelfDrafting.of(model, method.mask_token_id, method.block_size)
    problems = draw_problems(Arithmetic(), samples or 80, levels=LEVELS)
    return Experiment(
        slug=TiDAR.slug,
        claim=TiDAR.claim,
        task=SelfDraftingTask(tokenizer, problems, once=seeds[0]),
        subjects=make_subjects(model, tokenizer, plan, twins),
        baseline=PLAIN,
        judge=partial(judge, tokenizer=tokenizer, twins=twins, rows=rows_of(plan)),
        seeds=seeds,
        batch=1,
        models=twins,
        notes=f"Blocks of {plan.block_size}: a forward has {rows_of(plan)} rows, and checks {plan.block_size - 1} "
        f"guesses. Greedy subjects run once, sampled ones (temperature {TEMPERATURE}) with every seed. Guesses of "
        f"other kinds go through the same rows; bigrams are those of {LESSONS} lessons. Prompt lookup checks as many "
        f"guesses in a chain, the n-gram tree has {tree_width(plan) * (plan.block_size - 1)} nodes. The twin had the "
        "same batches and weights to start from, and learned next tokens alone. Accuracy against it is of "
        f"{MANY} problems. What was tried against the gap to it does not close it on dev problems "
        "either: a second phase of training, and a larger weight of the next tokens in it (alpha 4).",
        statistics=(EFFICIENCY,),
    )


def rows_of(plan: SelfDrafting) -> int:
    """Rows of a forward: the draft and its replicas."""
    return plan.block_size * (1 + plan.block_size)


def tree_width(plan: SelfDrafting) -> int:
    """Guesses at each depth of a tree that has about as many rows."""
    return (rows_of(plan) - 1) // (plan.block_size - 1)


def make_subjects(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: SelfDrafting,
    twins: dict[str, PreTrainedModel],
) -> list[Subject]:
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
    return [
        Subject(PLAIN, "plain", {}, Plan(model)),
        *(
            Subject(name, "method", {"block_size": size, "beta": beta}, Plan(model, SelfDrafting(mask, size, beta)))
            for name, beta in trust.items()
        ),
        *(
            Subject(name, "control", {"block_size": size}, Plan(model, OtherGuesses(mask, size, guess=guess)))
            for name, guess in guesses.items()
        ),
        *(
            Subject(name, "control", {"num_drafts": s.num_drafts, "draft_length": depth}, Plan(model, s))
            for name, s in drafters.items()
        ),
        *(Subject(name, "control", {"model": TWINS[name]}, Plan(twin)) for name, twin in twins.items()),
        Subject(PLAIN_SAMPLED, "control", {"temperature": TEMPERATURE}, Plan(model, None, TEMPERATURE)),
        Subject(
            SAMPLED,
            "method",
            {"block_size": size, "beta": 1.0, "temperature": TEMPERATURE},
            Plan(model, plan, TEMPERATURE),
        ),
    ]


# --- the verdict -----------------------------------------------------------------------------------------------------


def judge(
    comparison: Comparison, tokenizer: PreTrainedTokenizerBase, twins: dict[str, PreTrainedModel], rows: int
) -> list[Finding]:
    """Fewer forwards, the same text, the worth of the guesses, the price of learning them, sampling, trust and time."""
    efficiency = {name: comparison.interval(name, EFFICIENCY.name) for name in comparison.subjects}
    sampled = comparison.difference(SAMPLED, PLAIN_SAMPLED, "accuracy")
    return [
        Finding(
            f"greedy decoding gives at least {WANTED} tokens per forward",
            efficiency[METHOD].low >= WANTED,
            f"tokens per forward {efficiency[METHOD]:.2f}; guesses that came out, by depth: "
            f"{by_depth(comparison, METHOD)}",
        ),
        same_text(comparison),
        more_than(
            comparison, "its guesses are better than random ones, repetition and bigrams", RANDOM, REPEAT, BIGRAM
        ),
        more_than(
            comparison,
            "it needs fewer forwards than prompt lookup, and than an n-gram tree of as many rows",
            LOOKUP,
            TREE,
        ),
        price(comparison, tokenizer, twins),
        Finding(
            f"sampled text too has at least {WANTED} tokens per forward, and is as often right",
            efficiency[SAMPLED].low >= WANTED and not sampled.excludes_zero,
            f"tokens per forward {efficiency[SAMPLED]:.2f}; accuracy, drafted - plain: {sampled:+.3f}",
        ),
        trust(comparison, efficiency),
        seconds(comparison, rows),
    ]


def same_text(comparison: Comparison) -> Finding:
    plain = [detail["ids"] for detail in comparison.details(PLAIN) if detail]
    same = {
        name: sum(
            detail["ids"] == ids for detail, ids in zip(filter(None, comparison.details(name)), plain, strict=True)
        )
        for name in (*LOSSLESS, HALF, NONE)
    }
    return Finding(
        "with full trust in the causal rows every greedy text is the model's own, whoever guesses",
        all(same[name] == len(plain) for name in LOSSLESS),
        f"the same as token by token, of {len(plain)}: " + ", ".join(f"{name} {count}" for name, count in same.items()),
    )


def more_than(comparison: Comparison, statement: str, *controls: str) -> Finding:
    """Whether tokens per forward are surely above those of every control."""
    gains = {name: comparison.difference(METHOD, name, EFFICIENCY.name) for name in controls}
    numbers = (f"{n} {g:+.3f}, it has {comparison.mean(n, EFFICIENCY.name):.2f}" for n, g in gains.items())
    return Finding(
        statement, all(g.low > 0 for g in gains.values()), "tokens per forward, tidar - " + "; ".join(numbers)
    )


def price(comparison: Comparison, tokenizer: PreTrainedTokenizerBase, twins: dict[str, PreTrainedModel]) -> Finding:
    """Greedy accuracy token by token, which is that of drafted text, on more problems than are drafted."""
    models = {METHOD: comparison.experiment.subjects[0].apply.model, **twins}
    right = {name: np.array(solved(model, tokenizer, MANY), float) for name, model in models.items()}
    loss = paired_bootstrap(right[METHOD], right[TWIN])
    return Finding(
        f"learning to guess costs at most {CLOSE} of accuracy against its twin",
        loss.mean >= -CLOSE,
        f"accuracy, tidar - twin: {loss:+.3f}; "
        + ", ".join(f"{name} {values.mean():.3f}" for name, values in right.items()),
    )


def trust(comparison: Comparison, efficiency: dict[str, Interval]) -> Finding:
    gaps = {name: comparison.difference(name, METHOD, "accuracy") for name in (HALF, NONE)}
    return Finding(
        "accuracy hardly depends on the trust: the intervals of the differences contain 0",
        not any(gap.excludes_zero for gap in gaps.values()),
        "accuracy, minus that of beta 1: "
        + "; ".join(f"{n} {g:+.3f}, tokens per forward {efficiency[n]:.2f}" for n, g in gaps.items()),
    )


def seconds(comparison: Comparison, rows: int) -> Finding:
    """Times plain decoding, for a token and for a forward; medians over problems, whose runs are interleaved."""

    def times(name: str, unit: str) -> float:
        each = [comparison.values(n, "seconds") / comparison.values(n, unit) for n in (PLAIN, name)]
        return float(np.nanmedian(each[0] / each[1]))

    speed = {name: times(name, "tokens") for name in LOSSLESS}
    return Finding(
        "on this CPU it is faster than token by token",
        speed[METHOD] > 1,
        f"a step with {rows} rows takes {1 / times(METHOD, 'forward_passes'):.2f} times one of plain decoding; speed: "
        + ", ".join(f"{name} {value:.2f} x" for name, value in speed.items()),
    )


def by_depth(comparison: Comparison, subject: str) -> str:
    met = np.array([p for detail in comparison.details(subject) for p in detail.get("positions", ())])
    return ", ".join(f"{met[met[:, 0] == depth, 1].mean():.3f}" for depth in range(met[:, 0].max() + 1))
