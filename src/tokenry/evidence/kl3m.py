"""Does a vocabulary learned from a domain need fewer tokens there, and do short tokens withstand recognition errors?

Licence texts are the domain, docstrings of Python's library the general text, its code a second kind of other text.
The model takes no part; its tokenizer is a control. The paper's second claim about short tokens, that a small model
corrects better with them, is not measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..core.errors import InputError
from ..data.corpora import docstrings, library_source, license_texts, overlap, split, up_to_bytes, word_grams
from ..measure.claims import Finding, above, all_of, below
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.task import Arm
from ..measure.tasks.tokens import TokensTask
from ..tokenize.kl3m import KL3M, SPECIAL_TOKENS
from ..tokenize.text.measures import tokens_per_character

__all__ = ["build", "first_merges"]

GENERAL, DOMAIN, METHOD, PUBLISHED, WIDE, WIDE_DOMAIN, OWN = (
    "general BPE",
    "domain BPE, no custom tokens",
    "kl3m",
    "kl3m, custom tokens inside words",
    "kl3m, 32768",
    "domain BPE, 32768, no custom tokens",
    "the model's own",
)
CHAR, PLAIN, LARGE, EQUAL, BYTES = (
    "kl3m char",
    "plain BPE, 4096",
    "plain BPE, 32768",
    "plain BPE, tokens as short as char",
    "bytes",
)
VOCABULARY, LARGER = 8192, 32768
NEAR_COPY = 0.2  # a license that shares more of its 20-word stretches with training text is left out of new_licenses
PARAGRAPH = (100, 300)  # characters of the texts that are corrupted
SETS = 4


class Texts(NamedTuple):
    """Training texts: of equal size in bytes for the first two, all licenses for the third; and held-out sets."""

    general: list[str]
    domain: list[str]
    correction: list[str]
    licenses: list[str]
    docstrings: list[str]
    code: list[str]


@experiment("kl3m", KL3M, batch=50, quick=16)
def build(run: Run[KL3M]) -> Design:
    """Trains about a dozen tokenizers (a minute), and compares them on held-out text.

    Samples are held-out documents in all, in equal parts licenses, docstrings, code and paragraphs with recognition
    errors; by default all there are. `method` has settings to compare as well, trained on the text of its kind.
    """
    if run.samples is not None and run.samples < 2 * SETS:
        raise InputError(f"samples={run.samples} leaves less than two documents of a kind; give at least {2 * SETS}")
    texts = read_texts()
    seen = set().union(*map(word_grams, texts.correction))
    new = [overlap(text, seen) <= NEAR_COPY for text in texts.licenses]
    clean = paragraphs([text for text, is_new in zip(texts.licenses, new) if is_new])
    each = None if run.samples is None else run.samples // SETS
    sets = {name: getattr(texts, name)[:each] for name in ("licenses", "docstrings", "code")}
    return Design(
        task=TokensTask(sets, new[:each], clean[:each]),
        arms=[*domain_arms(texts, run.tokenizer), *correction_arms(texts), *given(texts, run.method)],
        baseline=GENERAL,
        on="tokenizers, trained here",
        notes=f"Vocabularies of {VOCABULARY}, where no other number stands, from equal numbers of bytes, split 80/20 "
        f"by document. New licenses share at most {NEAR_COPY:.0%} of their 20-word stretches with any training "
        "license. Char tokens and the plain BPEs beside them learn from all training licenses. Correction by a "
        "trained model is not measured.",
    )


def read_texts() -> Texts:
    """The corpora, split; the domain has as many training bytes as there are docstrings."""
    licenses, licenses_out = split(license_texts())
    general, docstrings_out = split(docstrings())
    domain = up_to_bytes(licenses, sum(len(text.encode()) for text in general))
    return Texts(general, domain, licenses, licenses_out, docstrings_out, split(library_source())[1])


def paragraphs(documents: Sequence[str]) -> list[str]:
    """The first paragraph of 100 to 300 characters of every document that has one, on one line."""
    found = []
    for document in documents:
        lines = (" ".join(part.split()) for part in re.split(r"\n\s*\n", document))
        found += [line for line in lines if PARAGRAPH[0] <= len(line) <= PARAGRAPH[1]][:1]
    return found


def domain_arms(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> list[Arm]:
    """Equal sizes and equal training bytes; what differs is the text, and the custom tokens."""
    bare = {"vocab_size": VOCABULARY, "custom_tokens": ()}
    return [
        trained(GENERAL, "plain", texts.general, **bare),
        Arm(OWN, role="control", setting={"vocabulary": len(tokenizer)}, apply=tokenizer),
        trained(DOMAIN, "control", texts.domain, **bare),
        trained(PUBLISHED, "control", texts.domain, vocab_size=VOCABULARY, single_word_alpha=False),
        trained(WIDE_DOMAIN, "control", texts.domain, vocab_size=LARGER, custom_tokens=()),
        trained(WIDE, "method", texts.domain, vocab_size=LARGER),
        trained(METHOD, "method", texts.domain, vocab_size=VOCABULARY),
    ]


def correction_arms(texts: Texts) -> list[Arm]:
    """Short tokens against plain BPE of equal size, of a large vocabulary, with as short tokens, and bytes alone."""
    bare = {"custom_tokens": (), "pad_to_power_of_two": False}
    char = trained(CHAR, "method", texts.correction, kind="char")
    plain = trained(PLAIN, "control", texts.correction, vocab_size=4096, **bare)
    equal, merges = as_short_as(char.apply, plain.apply, up_to_bytes(texts.correction, 200_000))
    return [
        char,
        plain,
        trained(LARGE, "control", texts.correction, vocab_size=LARGER, **bare),
        Arm(EQUAL, role="control", setting={"merges": merges}, apply=equal),
        Arm(BYTES, role="control", setting={"merges": 0}, apply=first_merges(plain.apply, 0)),
    ]


def given(texts: Texts, method: KL3M | None) -> list[Arm]:
    """The settings of the command line."""
    if method is None:
        return []
    text = texts.domain if method.kind == "domain" else texts.correction
    return [Arm("as given", method, apply=method.train(text))]


def trained(name: str, role: Any, texts: Sequence[str], **options: Any) -> Arm:
    method = KL3M(**options)
    setting = {**method.model_dump(mode="json"), "training_characters": sum(map(len, texts))}
    return Arm(name, method, role, setting, method.train(texts))


def first_merges(tokenizer: PreTrainedTokenizerFast, count: int) -> PreTrainedTokenizerFast:
    """The BPE that training would have given had it stopped after `count` merges."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = state["model"]
    bpe["merges"] = bpe["merges"][:count]
    made = {first + second for first, second in bpe["merges"]}
    bpe["vocab"] = {s: i for s, i in bpe["vocab"].items() if len(s) == 1 or s in made or s in SPECIAL_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


def as_short_as(
    char: PreTrainedTokenizerFast, plain: PreTrainedTokenizerFast, texts: Sequence[str]
) -> tuple[PreTrainedTokenizerFast, int]:
    """The first merges of `plain` that need about as many tokens for `texts` as `char` does, and their number."""
    target = tokens_per_character(char, texts)
    low, high = 0, len(plain)
    while high - low > 1:  # more merges never need more tokens, up to rounding of greedy merging
        middle = (low + high) // 2
        enough = tokens_per_character(first_merges(plain, middle), texts) <= target
        low, high = (low, middle) if enough else (middle, high)
    return first_merges(plain, high), high


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """Fewer tokens at home and more elsewhere, and why; steadier cuts, and whether short tokens alone explain them."""
    saved = partial(c.saved, arm=METHOD, than=GENERAL)
    sizes = "; ".join(f"{arm} {c.mean(arm, 'licenses'):.3f}" for arm in (METHOD, GENERAL, DOMAIN, PUBLISHED, OWN))
    cuts = "; ".join(
        f"{arm} {c.mean(arm, 'boundary_stability'):.3f} at {c.mean(arm, 'clean'):.3f}"
        for arm in (CHAR, PLAIN, LARGE, EQUAL, BYTES)
    )
    return [
        Finding(
            "On licenses the vocabulary learned from licenses needs fewer tokens than one of equal size learned from "
            "docstrings, and more on docstrings and code.",
            all_of(above(saved("licenses"), 0), below(saved("docstrings"), 0), below(saved("code"), 0)),
            main=True,
            note=f"tokens per character of licenses: {sizes}",
        ),
        Finding(
            f"It is not for near-copies: licenses that share at most {NEAR_COPY:.0%} of their 20-word stretches with "
            "training text also need fewer tokens.",
            above(saved("new_licenses"), 0),
            note=f"{saved('new_licenses').interval.n} licenses",
        ),
        Finding(
            "It is the text that saves: without the list of custom tokens the saving is there too.",
            above(c.saved("licenses", DOMAIN, GENERAL), 0),
        ),
        Finding(
            f"The list of custom tokens saves as well, in a vocabulary of {VOCABULARY} and in one of {LARGER}.",
            all_of(*(above(c.saved("licenses", *pair), 0) for pair in ((METHOD, DOMAIN), (WIDE, WIDE_DOMAIN)))),
            note=str(c.saved("licenses", METHOD, PUBLISHED)),
        ),
        Finding(
            "Cuts of tokens of at most 3 characters withstand recognition errors better than those of plain BPE, of "
            "equal size and of 32,768.",
            beats(c, "boundary_stability", CHAR, [PLAIN, LARGE]),
            note=f"boundary stability at tokens per character: {cuts}",
        ),
        Finding(
            "That is not only because the tokens are short: plain BPE with as many tokens per character is less steady "
            "(single bytes are steady by definition).",
            beats(c, "boundary_stability", CHAR, [EQUAL]),
        ),
    ]
