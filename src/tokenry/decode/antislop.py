"""Antislop: ban phrases, regular expressions and n-grams without banning their words.

Paper: Antislop: A Comprehensive Framework for Identifying and Eliminating Repetitive Patterns in Language Models,
arXiv 2510.15061. Generation runs normally; when a banned pattern is complete, the loop goes back to the token it
starts with, lowers that token by 10^(-10 s) (s = ban strength; 1 bans it), and samples again from there.

The result is not the model's distribution conditioned on having no pattern: a ban is local to the position and is
forgotten when a rewind goes further back.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import ClassVar, Literal

import ahocorasick
import regex
from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..fields import Count, Probability
from ..method import Lines
from ..words import STOP_WORDS, content_words, fold, is_word_character
from .core import Row, Violation
from .method import DecodeMethod, Plugins

__all__ = ["Antislop", "NGramBan", "PhraseBan", "RegexBan"]


class _Ban:
    """What the three monitors share: strength, repair options, and the violation they raise."""

    def __init__(
        self,
        strength: float = 1.0,
        *,
        force_backtrack: bool = False,
        invert_probs: bool = False,
        max_retries: int = 100,
    ) -> None:
        if not 0 <= strength <= 1:
            raise InputError(f"strength={strength} is not allowed; give a number in [0, 1], 1 for a hard ban")
        if max_retries < 1:
            raise InputError(f"max_retries={max_retries} is not allowed; give a number >= 1")
        self.factor = 0.0 if strength == 1 else 10.0 ** (-10 * strength)
        self.active = strength > 0
        self.repair = {"invert": invert_probs, "retries": max_retries, "relax": force_backtrack}

    def violation(self, row: Row, rule: str, start: int, stop: int, also: Iterable[int] = ()) -> Violation:
        index = row.token_at(start)
        factors = dict.fromkeys((row.ids[index], *also), self.factor)
        return Violation(index, rule, factors, span=(start, stop), **self.repair)

    def tokens_from(self, row: Row, char: int | None) -> int:
        """How many tokens a rewind to `char` would take back, with those that are not text yet."""
        first = row.decoded.done if char is None else min(row.token_at(char), row.decoded.done)
        return len(row.ids) - first


class PhraseBan(_Ban):
    """Ban phrases, ignoring case, at word boundaries. The cost does not grow with their number.

    Args:
        phrases: texts to ban. A side that is a word character needs a word boundary there; the end of the text
            counts as one.
        strength: s in [0, 1]; 1 is a hard ban, 0 nothing.
        prefer: which phrase counts when several start at one place.
    """

    def __init__(
        self, phrases: Sequence[str], strength: float = 1.0, prefer: str = "longest", **repair: object
    ) -> None:
        super().__init__(strength, **repair)
        if prefer not in ("longest", "shortest"):
            raise InputError(f"prefer={prefer!r} is unknown; use 'longest' or 'shortest'")
        for number, phrase in enumerate(phrases, 1):
            if not phrase.strip():
                raise InputError(f"phrase {number} ({phrase!r}) is empty and would match everywhere; remove it")
        self.sign = -1 if prefer == "longest" else 1
        self.longest = max(map(len, phrases), default=0)
        self.active = self.active and bool(phrases)
        self.automaton = ahocorasick.Automaton()
        for phrase in phrases:
            self.automaton.add_word(fold(phrase), phrase)
        if phrases:
            self.automaton.make_automaton()

    def check(self, row: Row) -> Violation | None:
        text = row.text
        if not self.active or len(text) <= row.checked:
            return None
        base = max(0, row.checked - self.longest + 1)
        best: tuple[int, int, str] | None = None
        for end, phrase in self.automaton.iter(fold(text[base:])):
            stop = base + end + 1
            start = stop - len(phrase)
            if stop <= row.checked or not _bounded(text, start, stop):
                continue
            if (row.token_at(start), f"phrase:{phrase}") in row.ignored:
                continue
            found = (start, self.sign * len(phrase), phrase)
            best = found if best is None else min(best, found)
        if best is None:
            return None
        start, _, phrase = best
        variants = start_tokens(row.decoded.tokenizer, phrase)
        return self.violation(row, f"phrase:{phrase}", start, start + len(phrase), variants)

    def hold(self, row: Row) -> int:
        """Tokens from the earliest place where a phrase may have begun."""
        if not self.active:
            return 0
        text = row.text
        base = max(0, len(text) - self.longest + 1)
        tail = fold(text[base:])
        for offset in range(len(tail)):
            start = base + offset
            inside_word = start > 0 and is_word_character(text[start]) and is_word_character(text[start - 1])
            if not inside_word and self.automaton.match(tail[offset:]):
                return self.tokens_from(row, start)
        return self.tokens_from(row, None)


class RegexBan(_Ban):
    """Ban regular expressions (ignoring case; `.` matches newlines, `^` and `$` at lines).

    The syntax is that of the package `regex`, which knows whether the end of a text may be the beginning of a match.

    Args:
        max_span: longest match in characters that is looked for. Needed for streaming: without it nothing can be
            shown before the end.
    """

    def __init__(
        self, patterns: Sequence[str], max_span: int | None = None, strength: float = 1.0, **repair: object
    ) -> None:
        super().__init__(strength, **repair)
        if max_span is not None and max_span < 1:
            raise InputError(f"max_span={max_span} is not allowed; give a number of characters >= 1")
        self.max_span = max_span
        self.patterns = [self._compile(p) for p in patterns]

    @staticmethod
    def _compile(pattern: str) -> regex.Pattern[str]:
        try:
            compiled = regex.compile(pattern, regex.IGNORECASE | regex.MULTILINE | regex.DOTALL)
        except regex.error as error:
            raise InputError(f"the regular expression {pattern!r} does not compile: {error}") from None
        if compiled.search(""):
            raise InputError(f"the regular expression {pattern!r} matches the empty text; make part of it obligatory")
        return compiled

    def check(self, row: Row) -> Violation | None:
        text = row.text
        if not self.active or len(text) <= row.checked:
            return None
        first = 0 if self.max_span is None else max(0, row.checked - self.max_span + 1)
        best: tuple[int, int, str] | None = None
        for pattern in self.patterns:
            for match in pattern.finditer(text, first):
                start, stop = match.span()
                too_long = self.max_span is not None and stop - start > self.max_span
                ignored = (row.token_at(start), f"regex:{pattern.pattern}") in row.ignored
                if stop <= row.checked or start == stop or too_long or ignored:
                    continue
                if best is None or start < best[0]:
                    best = (start, stop, pattern.pattern)
                break
        return None if best is None else self.violation(row, f"regex:{best[2]}", best[0], best[1])

    def hold(self, row: Row) -> int | None:
        """Tokens from the earliest place where a match may have begun."""
        if not self.active or not self.patterns:
            return 0
        if self.max_span is None:
            return None
        text = row.text
        first = max(0, len(text) - self.max_span + 1)
        begun = [
            match.start()
            for pattern in self.patterns
            for match in pattern.finditer(text, first, partial=True, overlapped=True)
            if match.partial and match.start() < len(text)
        ]
        return self.tokens_from(row, min(begun, default=None))


class NGramBan(_Ban):
    """Ban sequences of content words: stop words, numbers and punctuation may stand between them.

    Args:
        ngrams: each a text ("sun dipped horizon") or a sequence of words.
    """

    def __init__(
        self,
        ngrams: Sequence[str | Sequence[str]],
        strength: float = 1.0,
        stop_words: frozenset[str] = STOP_WORDS,
        **repair: object,
    ) -> None:
        super().__init__(strength, **repair)
        self.stop_words = stop_words
        self.ngrams: set[tuple[str, ...]] = set()
        for ngram in ngrams:
            text = ngram if isinstance(ngram, str) else " ".join(ngram)
            words = tuple(word for word, _, _ in content_words(text, stop_words))
            if not words:
                raise InputError(f"the n-gram {text!r} has no content word and would never match; remove it")
            self.ngrams.add(words)
        self.sizes = sorted({len(n) for n in self.ngrams}, reverse=True)
        followers: dict[tuple[str, ...], set[str]] = {}
        for words in self.ngrams:
            for k, word in enumerate(words):
                followers.setdefault(words[:k], set()).add(word)
        self.followers = {prefix: sorted(words) for prefix, words in followers.items()}

    def check(self, row: Row) -> Violation | None:
        if not self.active or len(row.text) <= row.checked:
            return None
        words = list(content_words(row.text, self.stop_words))
        for first in range(len(words)):
            for size in self.sizes:  # longer first
                span = words[first : first + size]
                ngram = tuple(word for word, _, _ in span)
                if len(span) < size or span[-1][2] <= row.checked or ngram not in self.ngrams:
                    continue
                rule = "ngram:" + " ".join(ngram)
                if (row.token_at(span[0][1]), rule) not in row.ignored:
                    return self.violation(row, rule, span[0][1], span[-1][2])
        return None

    def hold(self, row: Row) -> int:
        """Tokens from the earliest word that may have begun a banned n-gram."""
        if not self.active or not self.ngrams:
            return 0
        words = list(content_words(row.text, self.stop_words))[-self.sizes[0] :]
        for first in range(len(words)):
            run = tuple(word for word, _, _ in words[first:])
            if run in self.followers or self._may_become(run):
                return self.tokens_from(row, words[first][1])
        return self.tokens_from(row, None)

    def _may_become(self, run: tuple[str, ...]) -> bool:
        """Whether the last word of `run` may still grow into a word that continues a banned n-gram."""
        next_words = self.followers.get(run[:-1], [])
        place = bisect_left(next_words, run[-1])
        return place < len(next_words) and next_words[place].startswith(run[-1])


class Antislop(DecodeMethod):
    """The sampler as one method: phrases, regular expressions and n-grams with one strength."""

    slug: ClassVar[str] = "antislop"
    title: ClassVar[str] = "Antislop"
    paper: ClassVar[str] = (
        "Antislop: A Comprehensive Framework for Identifying and Eliminating Repetitive Patterns "
        "in Language Models, arXiv 2510.15061"
    )
    claim: ClassVar[str] = (
        "Banned phrases disappear completely while quality stays; banning their first tokens instead ruins the text."
    )

    phrases: Lines = Field((), description="phrases to ban, or a text file with one a line")
    regexes: Lines = Field((), description="regular expressions to ban, or a file with one a line")
    ngrams: Lines = Field((), description="sequences of content words to ban, or a file with one a line")
    strength: Probability = Field(1.0, description="probability factor 10^(-10 s); 1 bans, 0 does nothing")
    prefer: Literal["longest", "shortest"] = Field("longest", description="which phrase counts at one start")
    max_span: Count | None = Field(None, description="longest regex match in characters; needed for streaming")
    force_backtrack: bool = Field(False, description="drop temperature, min-p, top-p and top-k rather than give up")
    invert_probs: bool = Field(False, description="favour unlikely replacements")
    max_retries: Count = Field(100, description="repairs at one position before it is given up")

    @model_validator(mode="after")
    def _has_valid_patterns(self) -> Antislop:
        self.monitors()  # builds and thereby checks every pattern
        return self

    def monitors(self) -> list[_Ban]:
        """The monitors these parameters stand for; none at strength 0."""
        if self.strength == 0:
            return []
        repair = {
            "force_backtrack": self.force_backtrack,
            "invert_probs": self.invert_probs,
            "max_retries": self.max_retries,
        }
        made: list[_Ban] = []
        if self.phrases:
            made.append(PhraseBan(self.phrases, self.strength, self.prefer, **repair))
        if self.regexes:
            made.append(RegexBan(self.regexes, self.max_span, self.strength, **repair))
        if self.ngrams:
            made.append(NGramBan(self.ngrams, self.strength, **repair))
        return made

    def plugins(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Plugins:
        return Plugins(monitors=self.monitors())


def _bounded(text: str, start: int, stop: int) -> bool:
    """Whether both sides of text[start:stop] are word boundaries where they need to be."""
    left = start > 0 and is_word_character(text[start]) and is_word_character(text[start - 1])
    right = stop < len(text) and is_word_character(text[stop - 1]) and is_word_character(text[stop])
    return not left and not right


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
            piece = tokenizer.decode(ids)
            prefixes = [piece[:n] for n in range(1, len(piece)) if piece[:n].strip()]
            for token in ids + [t for p in prefixes for t in tokenizer.encode(p, add_special_tokens=False)[:1]]:
                if token not in special and tokenizer.decode([token]).strip():
                    found[token] = None
    return tuple(found)
