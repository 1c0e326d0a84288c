"""Does Antislop remove banned patterns at less cost in quality than banning their first tokens?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decode.antislop import Antislop
from ..measure.compare import Comparison
from ..measure.task import Experiment, Finding, Subject
from ..measure.tasks.stories import StoriesTask

PLAIN, SEQUENCES, FIRST, METHOD = "plain", "bad_words_ids", "ban first tokens", "antislop"


def default_phrases() -> list[str]:
    """The patterns that SmolLM2 overuses, from `measure/data`."""
    return (files("tokenry.data") / "prompts" / "slop_smollm2.txt").read_text(encoding="utf-8").split("\n")[:-1]


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    method: Antislop | None = None,
) -> Experiment:
    """Plain sampling, two `bad_words_ids` controls and Antislop on the same prompts and seeds."""
    method = method if method and method.phrases else Antislop(**{**_set(method), "phrases": default_phrases()})
    phrases = list(method.phrases)
    sequences = bad_word_ids(tokenizer, phrases)
    subjects = [
        Subject(PLAIN, "plain"),
        Subject(SEQUENCES, "control", {"phrases": phrases}, {"bad_words_ids": sequences}),
        Subject(FIRST, "control", {"phrases": phrases}, {"bad_words_ids": first_tokens(sequences)}),
        Subject(METHOD, "method", method.model_dump(mode="json"), {"methods": [method]}),
    ]
    return Experiment(
        slug="antislop",
        claim=Antislop.claim,
        task=StoriesTask(model, tokenizer, phrases, count=samples or 24),
        subjects=subjects,
        baseline=PLAIN,
        judge=judge,
        seeds=tuple(seeds or (0,)),
        batch=8,
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


def corpus_perplexity(comparison: Comparison, subject: str) -> float:
    """Perplexity over all tokens of all stories."""
    details = comparison.details(subject)
    return math.exp(sum(d["nll"] for d in details) / sum(len(d["tokens"]) for d in details))


def judge(comparison: Comparison) -> list[Finding]:
    """The claim, its price, and the controls."""
    hits = {s: comparison.mean(s, "hits_per_1000_words") for s in comparison.subjects}
    given_up = sum(m["kind"] == "given up" for d in comparison.details(METHOD) for m in d["marks"])
    perplexity = {s: corpus_perplexity(comparison, s) for s in comparison.subjects}
    ratio = {s: p / perplexity[PLAIN] for s, p in perplexity.items()}
    worse = comparison.difference(FIRST, METHOD, "perplexity")
    variety = comparison.difference(FIRST, METHOD, "distinct_2")
    return [
        Finding(
            "no banned pattern is left, and the plain model has many",
            hits[METHOD] == 0 and hits[PLAIN] > 0,
            f"hits per 1,000 words: {_list(hits)}; places given up: {given_up}",
        ),
        Finding(
            "perplexity stays below 1.15 x plain",
            ratio[METHOD] <= 1.15,
            f"corpus perplexity: {_list(perplexity)}; ratio to plain: {_list(ratio)}",
        ),
        Finding(
            "banning first tokens costs more perplexity",
            worse.low > 0,
            f"perplexity, {FIRST} - {METHOD}: {worse:.2f}",
        ),
        Finding(
            "banning first tokens costs more variety (distinct-2)",
            variety.high < 0,
            f"distinct-2, {FIRST} - {METHOD}: {variety:.4f}",
        ),
    ]


def _set(method: Antislop | None) -> dict:
    return method.model_dump(exclude_unset=True) if method else {}


def _list(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in numbers.items())
