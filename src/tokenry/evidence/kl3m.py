"""Does a vocabulary learned from a domain need fewer tokens there, and do short tokens withstand recognition errors?

Licence texts are the domain, docstrings of Python's library the general text, its code a second kind of other text.
The model takes no part; its tokenizer is a control. The paper's second claim about short tokens, that a small model
corrects better with them, is not measured.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..core.errors import InputError
from ..data.corpora import docstrings, library_source, license_texts, overlap, split, up_to_bytes, word_grams
from ..measure.compare import Comparison
from ..measure.statistics import Interval, bootstrap_statistic
from ..measure.task import Experiment, Finding, Subject
from ..measure.tasks.tokens import TokensTask
from ..tokenize.kl3m import KL3M, SPECIAL_TOKENS
from ..tokenize.text.measures import tokens_per_character

__all__ = ["build", "first_merges"]

GENERAL, DOMAIN, METHOD, PUBLISHED, OWN = (
    "general BPE",
    "domain BPE, no custom tokens",
    "kl3m",
    "kl3m, custom tokens inside words",
    "the model's own",
)
CHAR, PLAIN, LARGE, EQUAL, BYTES = (
    "kl3m char",
    "plain BPE, 4096",
    "plain BPE, 32768",
    "plain BPE, tokens as short as char",
    "bytes",
)
VOCABULARY = 8192
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


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    method: KL3M | None = None,
) -> Experiment:
    """Trains about ten tokenizers (half a minute), and compares them on held-out text.

    Args:
        samples: held-out documents in all, in equal parts licenses, docstrings, code and paragraphs with recognition
            errors; default: all there are.
        method: settings to compare as well, trained on the text of its kind.
    """
    if samples is not None and samples < 2 * SETS:
        raise InputError(f"samples={samples} leaves less than two documents of a kind; give at least {2 * SETS}")
    texts = read_texts()
    seen = set().union(*map(word_grams, texts.correction))
    new = [overlap(text, seen) <= NEAR_COPY for text in texts.licenses]
    clean = paragraphs([text for text, is_new in zip(texts.licenses, new) if is_new])
    each = None if samples is None else samples // SETS
    sets = {name: getattr(texts, name)[:each] for name in ("licenses", "docstrings", "code")}
    return Experiment(
        slug=KL3M.slug,
        claim=KL3M.claim,
        task=TokensTask(sets, new[:each], clean[:each]),
        subjects=[*domain_subjects(texts, tokenizer), *correction_subjects(texts), *given(texts, method)],
        baseline=GENERAL,
        judge=judge,
        seeds=tuple(seeds or (0,)),
        batch=50,
        notes=f"Vocabularies of {VOCABULARY} from equal numbers of bytes, split 80/20 by document. New licenses share "
        f"at most {NEAR_COPY:.0%} of their 20-word stretches with any training license. Char tokens and the plain BPEs "
        "beside them learn from all training licenses. Correction by a trained model is not measured.",
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


def domain_subjects(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> list[Subject]:
    """Equal sizes and equal training bytes; what differs is the text, and the custom tokens."""
    bare = {"vocab_size": VOCABULARY, "custom_tokens": ()}
    return [
        trained(GENERAL, "plain", texts.general, **bare),
        Subject(OWN, "control", {"vocabulary": len(tokenizer)}, tokenizer),
        trained(DOMAIN, "control", texts.domain, **bare),
        trained(PUBLISHED, "control", texts.domain, vocab_size=VOCABULARY, single_word_alpha=False),
        trained(METHOD, "method", texts.domain, vocab_size=VOCABULARY),
    ]


def correction_subjects(texts: Texts) -> list[Subject]:
    """Short tokens against plain BPE of equal size, of a large vocabulary, with as short tokens, and bytes alone."""
    bare = {"custom_tokens": (), "pad_to_power_of_two": False}
    char = trained(CHAR, "method", texts.correction, kind="char")
    plain = trained(PLAIN, "control", texts.correction, vocab_size=4096, **bare)
    equal, merges = as_short_as(char.apply, plain.apply, up_to_bytes(texts.correction, 200_000))
    return [
        char,
        plain,
        trained(LARGE, "control", texts.correction, vocab_size=32768, **bare),
        Subject(EQUAL, "control", {"merges": merges}, equal),
        Subject(BYTES, "control", {"merges": 0}, first_merges(plain.apply, 0)),
    ]


def given(texts: Texts, method: KL3M | None) -> list[Subject]:
    """The settings of the command line."""
    if method is None:
        return []
    text = texts.domain if method.kind == "domain" else texts.correction
    return [Subject("as given", "method", method.model_dump(mode="json"), method.train(text))]


def trained(name: str, role: Any, texts: Sequence[str], **options: Any) -> Subject:
    method = KL3M(**options)
    setting = {**method.model_dump(mode="json"), "training_characters": sum(map(len, texts))}
    return Subject(name, role, setting, method.train(texts))


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


def judge(comparison: Comparison) -> list[Finding]:
    """Fewer tokens at home and more elsewhere, and why; steadier cuts, and whether short tokens alone explain them."""
    return [
        domain_finding(comparison),
        copies_finding(comparison),
        custom_finding(comparison),
        stability_finding(comparison),
        length_finding(comparison),
    ]


def saving(comparison: Comparison, subject: str, base: str, name: str) -> Interval:
    """(tokens of base - tokens of subject) / tokens of base, over all documents of a set, with its interval."""
    a, b = comparison.values(subject, name), comparison.values(base, name)
    measured = ~np.isnan(a + b)
    a, b = a[measured], b[measured]
    if not len(a):
        return Interval(float("nan"), float("nan"), float("nan"), 0)
    return bootstrap_statistic(lambda pick: float(1 - a[pick].sum() / b[pick].sum()), len(a))


def _saved(comparison: Comparison, subject: str, base: str, name: str) -> tuple[Interval, str]:
    found = saving(comparison, subject, base, name)
    each = [f"{s} {comparison.mean(s, name):.3f}" for s in (subject, base)]
    share = f"{found:.1%}"
    return found, f"{name.replace('_', ' ')}: {each[0]}, {each[1]} tokens per character, {share} saved"


def domain_finding(comparison: Comparison) -> Finding:
    home, first = _saved(comparison, METHOD, GENERAL, "licenses")
    other, second = _saved(comparison, METHOD, GENERAL, "docstrings")
    code, third = _saved(comparison, METHOD, GENERAL, "code")
    return Finding(
        "On licenses the vocabulary learned from licenses needs fewer tokens than one of equal size learned from "
        "docstrings, and more on docstrings and code.",
        home.low > 0 and other.high < 0 and code.high < 0,
        f"{first}; {second}; {third}",
    )


def copies_finding(comparison: Comparison) -> Finding:
    new, numbers = _saved(comparison, METHOD, GENERAL, "new_licenses")
    return Finding(
        f"It is not for near-copies: licenses that share at most {NEAR_COPY:.0%} of their 20-word stretches with "
        "training text also need fewer tokens.",
        new.low > 0,
        f"{numbers}; {new.n} licenses",
    )


def custom_finding(comparison: Comparison) -> Finding:
    bare, first = _saved(comparison, DOMAIN, GENERAL, "licenses")
    _, second = _saved(comparison, METHOD, DOMAIN, "licenses")
    _, third = _saved(comparison, METHOD, PUBLISHED, "licenses")
    return Finding(
        "It is the text that saves and not the list of custom tokens: without them the saving is there too.",
        bare.low > 0,
        f"{first}; {second}; {third}",
    )


def _steadier(comparison: Comparison, base: str) -> tuple[bool, str]:
    gap = comparison.difference(CHAR, base, "boundary_stability")
    stable, size = comparison.mean(base, "boundary_stability"), comparison.mean(base, "clean")
    numbers = f"{base} {stable:.3f} at {size:.3f} tokens per character"
    return gap.low > 0, f"{numbers}, {gap:+.3f} to {CHAR}"


def stability_finding(comparison: Comparison) -> Finding:
    equal, first = _steadier(comparison, PLAIN)
    large, second = _steadier(comparison, LARGE)
    own = f"{CHAR} {comparison.mean(CHAR, 'boundary_stability'):.3f} at {comparison.mean(CHAR, 'clean'):.3f}"
    return Finding(
        "Cuts of tokens of at most 3 characters withstand recognition errors better than those of plain BPE, of equal "
        "size and of 32,768.",
        equal and large,
        f"boundary stability: {own} tokens per character; {first}; {second}",
    )


def length_finding(comparison: Comparison) -> Finding:
    short, first = _steadier(comparison, EQUAL)
    _, second = _steadier(comparison, BYTES)
    return Finding(
        "That is not only because the tokens are short: plain BPE with as many tokens per character is less steady "
        "(single bytes are steady by definition).",
        short,
        f"{first}; {second}",
    )
