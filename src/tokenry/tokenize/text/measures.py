"""What a tokenizer does to text, as numbers. They take any tokenizer of transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from ...core.errors import InputError
from ...text.token_text import check_encodable

__all__ = [
    "boundary_stability",
    "shared_boundaries",
    "term_lengths",
    "token_counts",
    "token_offsets",
    "token_size_profile",
    "tokens_per_character",
]


def token_counts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """Tokens of each text, without special tokens: some tokenizers add two to everything."""
    texts = _listed(texts)
    if not all(isinstance(text, str) for text in texts):
        raise InputError("texts holds something that is not text; give a list of strings, not token ids")
    for number, text in enumerate(texts):
        check_encodable(text, f"text {number}")
    if not texts:
        return []
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False).input_ids]


def tokens_per_character(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """Sum of tokens / sum of characters (arXiv 2503.17247); lower is better.

    Raises:
        InputError: no characters.
    """
    texts = _listed(texts)
    characters = sum(map(len, texts))
    if not characters:
        raise InputError("there is no text to count; give at least one that is not empty")
    return sum(token_counts(tokenizer, texts)) / characters


def term_lengths(tokenizer: PreTrainedTokenizerBase, terms: Sequence[str]) -> dict[str, int]:
    """Tokens of each term encoded alone, without a leading space."""
    terms = _listed(terms)
    return dict(zip(terms, token_counts(tokenizer, terms)))


def token_size_profile(tokenizer: PreTrainedTokenizerBase) -> dict[int, float]:
    """Share of vocabulary strings of each length, counted as they stand there (byte-level: é is two, Ġ is one).

    Special tokens do not count: no text is cut into them.
    """
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    lengths = Counter(len(string) for string in tokenizer.get_vocab() if string not in special)
    total = sum(lengths.values())
    return {length: lengths[length] / total for length in sorted(lengths)}


def token_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and the characters [start, end) of each, without special tokens.

    Raises:
        InputError: a tokenizer that does not know where its tokens come from.
    """
    if not tokenizer.is_fast:
        raise InputError(f"{type(tokenizer).__name__} gives no offsets; use the fast tokenizer of that model")
    check_encodable(text, "the text")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], [tuple(span) for span in encoded["offset_mapping"]]


def boundary_stability(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> float:
    """How well the token borders of a wrong text agree with those of the right one: 1 is the same, 0 all different.

    Mean over pairs of `shared_boundaries`. One token per byte is perfectly stable, so look at tokens per character too.

    Args:
        pairs: (wrong, right) texts; up to a few thousand characters each, as aligning takes quadratic time.

    Raises:
        InputError: no pairs, or a tokenizer without offsets.
    """
    if any(isinstance(pair, str) for pair in pairs):
        raise InputError(f"pairs={pairs!r} holds texts; give a list of pairs, for example [(wrong, right)]")
    if not pairs:
        raise InputError("there are no pairs to compare; give at least one (wrong, right) pair of texts")
    shares = []
    for wrong, right in pairs:
        ends = [[end for _, end in token_offsets(tokenizer, text)[1]] for text in (wrong, right)]
        shares.append(shared_boundaries(align(wrong, right), *ends))
    return sum(shares) / len(shares)


@lru_cache(maxsize=1024)
def align(wrong: str, right: str) -> Mapping[int, int]:
    """{character of `wrong`: character of `right`}: equal stretches, and replaced stretches of the same length."""
    aligned: dict[int, int] = {}
    for kind, a, b, c, d in SequenceMatcher(None, wrong, right, autojunk=False).get_opcodes():
        if kind == "equal" or (kind == "replace" and b - a == d - c):
            aligned.update(zip(range(a, b), range(c, d)))
    return aligned


def shared_boundaries(aligned: Mapping[int, int], wrong_ends: Sequence[int], right_ends: Sequence[int]) -> float:
    """Jaccard index of two sets of token ends, both as characters of the right text and aligned ones only.

    Args:
        aligned: {character of the wrong text: character of the right text}.
        wrong_ends, right_ends: ends of tokens, exclusive.

    Returns:
        Shared / all; 1 where neither has any.
    """
    comparable = set(aligned.values())
    wrong = {aligned[end - 1] for end in wrong_ends if end - 1 in aligned}
    right = {end - 1 for end in right_ends if end - 1 in comparable}
    return len(wrong & right) / len(wrong | right) if wrong | right else 1.0


def _listed(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise InputError("the texts are one string; give a list, for example [text]")
    return list(texts)
