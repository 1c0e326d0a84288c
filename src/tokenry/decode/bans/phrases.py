"""Banned phrases: all of them are looked for at once, in the newest text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import ahocorasick
from transformers import PreTrainedTokenizerBase

from ...core.errors import InputError
from ...text.words import bare, fold, inside_word, listed
from ..generation.monitor import Violation
from ..generation.sequence import SequenceState
from .ban import Ban, folded_text

__all__ = ["PhraseBan"]


class PhraseBan(Ban):
    """Ban phrases, as `words.fold` compares them, at word boundaries. The cost does not grow with their number.

    Args:
        phrases: texts to ban. A side that is a word character needs a word boundary there; the end of the text
            counts as one.
        strength: s in [0, 1]; 1 is a hard ban, 0 nothing.
        prefer: which phrase counts when several start at one place.
        start_tokens: lower not only the token that was rejected, but every one that the phrase can start with, as the
            paper's local sampler does. Takes away tokens that do not lead to the phrase.
    """

    def __init__(
        self,
        phrases: str | Sequence[str],
        strength: float = 1.0,
        prefer: str = "longest",
        start_tokens: bool = False,
        **repair: Any,
    ) -> None:
        super().__init__(strength, **repair)
        if prefer not in ("longest", "shortest"):
            raise InputError(f"prefer={prefer!r} is unknown; use 'longest' or 'shortest'")
        self.written = listed(phrases, "phrase")
        self.known = known(tuple(self.written))
        self.sign = -1 if prefer == "longest" else 1
        self.start_tokens = start_tokens
        self.active = self.active and bool(self.written)

    def check(self, row: SequenceState) -> Violation | None:
        if not self.active or len(row.text) <= row.checked:
            return None
        folded = folded_text(row)
        base = max(0, folded.index(row.checked) - self.known.longest)
        best: tuple[int, int, str, int] | None = None
        for last, (size, phrase) in self.known.automaton.iter(folded.text[base:]):
            end = base + last + 1
            span = folded.span(end - size, end)
            if span is None or span[1] <= row.checked or not _bounded(folded.text, end - size, end):
                continue
            if (row.token_at(span[0]), f"phrase:{phrase}") in row.ignored:
                continue
            found = (span[0], self.sign * size, phrase, span[1])
            best = found if best is None else min(best, found)
        if best is None:
            return None
        start, _, phrase, stop = best
        also = start_tokens(row.token_text.tokenizer, phrase) if self.start_tokens else ()
        return self.violation(row, f"phrase:{phrase}", start, stop, also)

    def hold(self, row: SequenceState) -> int:
        """Tokens from the earliest place where a phrase may have begun."""
        if not self.active:
            return 0
        folded = folded_text(row)
        base = max(0, len(folded.text) - self.known.longest)
        tail = folded.text[base:]
        letters = tail if tail.isascii() else [bare(c) for c in tail]
        for offset in range(len(tail)):
            start = base + offset
            if start and folded.starts[start] == folded.starts[start - 1]:
                continue
            if not inside_word(folded.text, start) and self.known.beginnings.match("".join(letters[offset:])):
                return self.tokens_from(row, folded.starts[start])
        return self.tokens_from(row, None)


class Known(NamedTuple):
    """What phrases are looked up in. `longest`: characters of the longest one, folded."""

    automaton: ahocorasick.Automaton
    beginnings: ahocorasick.Automaton
    longest: int


@lru_cache(maxsize=8)
def known(phrases: tuple[str, ...]) -> Known:
    """Made once for the texts that share a list, of which it is never changed.

    Raises:
        InputError: an empty phrase.
    """
    automaton, beginnings, longest = ahocorasick.Automaton(), ahocorasick.Automaton(), 0
    for number, phrase in enumerate(phrases, 1):
        folded = fold(phrase)
        if not bare(folded).strip():
            raise InputError(f"phrase {number} ({phrase!r}) is empty and would match everywhere; remove it")
        longest = max(longest, len(folded))
        automaton.add_word(folded, (len(folded), phrase))
        beginnings.add_word(bare(folded), True)
    if phrases:
        automaton.make_automaton()
    return Known(automaton, beginnings, longest)


def _bounded(text: str, start: int, stop: int) -> bool:
    """Whether both sides of text[start:stop] are word boundaries where they need to be."""
    return not inside_word(text, start) and not inside_word(text, stop)


@lru_cache(maxsize=65536)
def start_tokens(tokenizer: PreTrainedTokenizerBase, phrase: str) -> tuple[int, ...]:
    """Tokens a phrase can start with: lower, Capitalised and UPPER, with and without a leading space, and the
    tokens of every proper prefix of those first tokens (a lone space excepted)."""
    found: dict[int, None] = {}
    special = set(tokenizer.all_special_ids)
    lower = phrase.lower()
    for form in (lower, lower[:1].upper() + lower[1:], phrase.upper()):
        for text in (form, " " + form):
            ids = tokenizer.encode(text, add_special_tokens=False)[:1]
            if not ids:
                continue
            piece = cast(str, tokenizer.decode(ids))
            prefixes = [piece[:n] for n in range(1, len(piece)) if piece[:n].strip()]
            for token in ids + [t for p in prefixes for t in tokenizer.encode(p, add_special_tokens=False)[:1]]:
                if token not in special and cast(str, tokenizer.decode([token])).strip():
                    found[token] = None
    return tuple(found)
