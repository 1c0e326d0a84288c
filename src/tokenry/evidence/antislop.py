"""Does Antislop remove banned patterns at less cost in quality than banning their first tokens?"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from importlib.resources import files

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..decode.antislop import Antislop
from ..measure.claims import Contrast, Finding, all_of, at_least, at_most, loses_at_most
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import bootstrap_statistic
from ..measure.task import Arm
from ..measure.tasks.stories import StoriesTask

PLAIN, SEQUENCES, FIRST, METHOD = "plain", "bad_words_ids", "ban first tokens", "antislop"


def default_phrases() -> list[str]:
    """The patterns that SmolLM2 overuses, from `data/prompts`."""
    return (files("tokenry.data") / "prompts" / "slop_smollm2.txt").read_text(encoding="utf-8").split("\n")[:-1]


@experiment("antislop", Antislop, samples=64, seeds=(2, 3), batch=8, quick=2)
def build(run: Run[Antislop]) -> Design:
    """Plain sampling, two `bad_words_ids` controls and Antislop on the same prompts and seeds."""
    method = run.method
    if not method or not method.phrases:
        method = Antislop(**{**run.given, "phrases": default_phrases()})
    phrases = list(method.phrases)
    sequences, named = bad_word_ids(run.tokenizer, phrases), {"phrases": phrases}
    return Design(
        task=StoriesTask(run.model, run.tokenizer, phrases, count=run.count),
        arms=[
            Arm(PLAIN, role="plain"),
            Arm(SEQUENCES, role="control", setting=named, apply={"bad_words_ids": sequences}),
            Arm(FIRST, role="control", setting=named, apply={"bad_words_ids": first_tokens(sequences)}),
            Arm(METHOD, method),
        ],
        baseline=PLAIN,
        facts={"phrases": phrases},
        tried="Seeds 0 and 1, the second one after the first had left a finding undecided.",
        notes="`ban first tokens` is what certainty costs without rewinding. `bad_words_ids` bans the last token of a "
        "sequence where it would be completed; it misses other tokenizations and leaves the beginning of the phrase "
        "standing. What is left is counted in the finished texts, by a regular expression and not by the rule that "
        "bans.",
    )


def bad_word_ids(tokenizer: PreTrainedTokenizerBase, phrases: Sequence[str]) -> list[list[int]]:
    """What a user of `bad_words_ids` would pass: every phrase with and without a leading space and a capital."""
    forms = [f for p in phrases for f in (p, " " + p, p.capitalize(), " " + p.capitalize())]
    return [tokenizer.encode(form, add_special_tokens=False) for form in forms]


def first_tokens(sequences: Sequence[list[int]]) -> list[list[int]]:
    """Their first tokens alone, which is what it takes to be sure without rewinding."""
    return [[token] for token in dict.fromkeys(ids[0] for ids in sequences)]


def pattern(phrases: Sequence[str]) -> re.Pattern[str]:
    """Finds the phrases in a finished text, as whole words, whatever their case and the white space in them."""
    ways = "|".join(r"\s+".join(map(re.escape, phrase.split())) for phrase in phrases)
    return re.compile(rf"(?<!\w)(?:{ways})(?!\w)", re.IGNORECASE)


def rate(c: Comparison, arm: str, of: Callable[[dict], tuple[float, int]]) -> Callable[[np.ndarray], float]:
    """A sum over the stories with these indices for each of what it is counted in; seeds together."""
    rows = np.array([of(detail) for detail in c.details(arm)], float).reshape(-1, len(c.samples), 2).sum(0)
    return lambda pick: rows[pick, 0].sum() / rows[pick, 1].sum()


def gone(c: Comparison, arm: str, phrases: Sequence[str]) -> Contrast:
    """The share of the plain model's banned phrases for each word that an arm does not have."""
    banned = pattern(phrases)

    def hits(detail: dict) -> tuple[float, int]:
        text = "".join(piece for piece, _ in detail["tokens"])
        return len(banned.findall(text)), len(text.split())

    mine, plain = (rate(c, name, hits) for name in (arm, PLAIN))
    share = bootstrap_statistic(lambda p: 1 - mine(p) / plain(p) if plain(p) else math.nan, len(c.samples))
    return Contrast(share, f"phrases gone, {arm}", ".1%")


def perplexity_over(c: Comparison, arm: str, than: str = PLAIN) -> Contrast:
    """How much higher the perplexity over all tokens of all stories is."""
    mine, other = (rate(c, name, lambda detail: (detail["nll"], len(detail["tokens"]))) for name in (arm, than))
    more = bootstrap_statistic(lambda pick: math.expm1(mine(pick) - other(pick)), len(c.samples))
    return Contrast(more, f"corpus perplexity, {arm} over {than}", "+.1%")


@build.findings
def findings(c: Comparison, phrases: Sequence[str]) -> list[Finding]:
    """The claim, its price, and the controls."""
    hits = "hits_per_1000_words"
    given_up = sum(m["kind"] == "given up" for d in c.details(METHOD) for m in d["marks"])
    shown = ", ".join(f"{s} {c.mean(s, hits):.2f}" for s in c.arms)
    return [
        Finding(
            "no banned phrase is left of those that the plain model writes",
            at_least(gone(c, METHOD, phrases), 1),
            main=True,
            note=f"{gone(c, SEQUENCES, phrases)}; hits of the ban's own rule per 1,000 words: {shown}; places given "
            f"up: {given_up}",
        ),
        Finding(
            "perplexity is at most 15 % above the plain model's",
            at_most(perplexity_over(c, METHOD), 0.15),
            note="; ".join(str(perplexity_over(c, s)) for s in (SEQUENCES, FIRST)),
        ),
        Finding("banning first tokens costs more perplexity", beats(c, "perplexity", METHOD, [FIRST], "+.2f")),
        Finding(
            "banning first tokens costs more variety (distinct-2)", beats(c, "distinct_2", METHOD, [FIRST], "+.4f")
        ),
        Finding(
            "it costs no more than `bad_words_ids`, which is not sure to remove them",
            all_of(
                loses_at_most(perplexity_over(c, SEQUENCES, METHOD), 0.05),
                loses_at_most(c.gap("distinct_2", METHOD, SEQUENCES, "+.4f"), 0.01),
            ),
        ),
    ]
