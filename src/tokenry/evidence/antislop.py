"""Does Antislop remove banned patterns at less cost in quality than banning their first tokens?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..decode.antislop import Antislop
from ..measure.claims import Contrast, Finding, at_least, at_most, describe
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import bootstrap_statistic
from ..measure.task import Arm
from ..measure.tasks.stories import StoriesTask

PLAIN, SEQUENCES, FIRST, METHOD = "plain", "bad_words_ids", "ban first tokens", "antislop"


def default_phrases() -> list[str]:
    """The patterns that SmolLM2 overuses, from `measure/data`."""
    return (files("tokenry.data") / "prompts" / "slop_smollm2.txt").read_text(encoding="utf-8").split("\n")[:-1]


@experiment("antislop", Antislop, samples=24, batch=8, quick=2)
def build(run: Run) -> Design:
    """Plain sampling, two `bad_words_ids` controls and Antislop on the same prompts and seeds."""
    method = run.method
    if not method or not method.phrases:
        method = Antislop(**{**run.given, "phrases": default_phrases()})
    phrases = list(method.phrases)
    sequences, named = bad_word_ids(run.tokenizer, phrases), {"phrases": phrases}
    return Design(
        task=StoriesTask(run.model, run.tokenizer, phrases, count=run.samples),
        arms=[
            Arm(PLAIN, role="plain"),
            Arm(SEQUENCES, role="control", setting=named, apply={"bad_words_ids": sequences}),
            Arm(FIRST, role="control", setting=named, apply={"bad_words_ids": first_tokens(sequences)}),
            Arm(METHOD, method),
        ],
        baseline=PLAIN,
        notes="`ban first tokens` is what certainty costs without rewinding. `bad_words_ids` bans the last token of a "
        "sequence where it would be completed; it misses other tokenizations and leaves the beginning of the phrase "
        "standing. For a short list of common phrases it is a strong control: compare its row.",
    )


def bad_word_ids(tokenizer: PreTrainedTokenizerBase, phrases: Sequence[str]) -> list[list[int]]:
    """What a user of `bad_words_ids` would pass: every phrase with and without a leading space and a capital."""
    forms = [f for p in phrases for f in (p, " " + p, p.capitalize(), " " + p.capitalize())]
    return [tokenizer.encode(form, add_special_tokens=False) for form in forms]


def first_tokens(sequences: Sequence[list[int]]) -> list[list[int]]:
    """Their first tokens alone, which is what it takes to be sure without rewinding."""
    return [[token] for token in dict.fromkeys(ids[0] for ids in sequences)]


def perplexity_ratio(c: Comparison, arm: str) -> Contrast:
    """Perplexity over all tokens of all stories, times that of the plain model, with its interval over stories."""

    def by_story(name: str) -> np.ndarray:
        rows = np.array([(detail["nll"], len(detail["tokens"])) for detail in c.details(name)], float)
        return rows.reshape(-1, len(c.samples), 2).sum(0)

    def nats(rows: np.ndarray) -> float:
        return rows[:, 0].sum() / rows[:, 1].sum()

    mine, plain = by_story(arm), by_story(PLAIN)
    ratio = bootstrap_statistic(lambda pick: math.exp(nats(mine[pick]) - nats(plain[pick])), len(c.samples))
    return Contrast(ratio, f"corpus perplexity, {arm} / {PLAIN}", ".2f")


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """The claim, its price, and the controls."""
    hits = "hits_per_1000_words"
    given_up = sum(m["kind"] == "given up" for d in c.details(METHOD) for m in d["marks"])
    shown = ", ".join(f"{s} {c.mean(s, hits):.2f}" for s in c.arms)
    others = "; ".join(str(perplexity_ratio(c, s)) for s in (SEQUENCES, FIRST))
    return [
        Finding(
            "no banned pattern is left of those that the plain model writes",
            at_least(c.saved(hits, METHOD, PLAIN), 1),
            main=True,
            note=f"hits per 1,000 words: {shown}; places given up: {given_up}",
        ),
        Finding("perplexity stays below 1.15 x plain", at_most(perplexity_ratio(c, METHOD), 1.15), note=others),
        Finding("banning first tokens costs more perplexity", beats(c, "perplexity", METHOD, [FIRST], "+.2f")),
        Finding(
            "banning first tokens costs more variety (distinct-2)", beats(c, "distinct_2", METHOD, [FIRST], "+.4f")
        ),
        describe(
            "bad_words_ids is the control to beat for a short list",
            f"{c.gap('perplexity', SEQUENCES, METHOD, '+.2f')}; {c.gap('distinct_2', SEQUENCES, METHOD, '+.4f')}",
        ),
    ]
