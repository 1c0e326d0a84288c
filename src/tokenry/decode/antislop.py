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
from itertools import chain, takewhile
from typing import ClassVar, Literal, NamedTuple

import ahocorasick
import regex
from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.fields import Count, Probability
from ..core.method import Lines
from ..text.ngrams import Begun, Found, NGrams
from ..text.token_text import special_tokens
from ..text.words import STOP_WORDS, FoldedText, Word, WordList, bare, fold, inside_word, listed, words
from .contract import LoopMethod, Plugins
from .generation.monitor import Violation
from .generation.sequence import SequenceState

__all__ = ["Antislop", "NGramBan", "PhraseBan", "RegexBan"]

REREAD = 256  # characters of the end that a regular expression without a span always looks at again


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
        self.written: list[str] = []  # the patterns as the user gave them

    def begin(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse patterns with special tokens: they are not text, so that nothing would ever match."""
        everything = "\n".join(self.written)
        for token, number in special_tokens(tokenizer).items():
            if token in everything or regex.escape(token) in everything:
                raise InputError(
                    f"the pattern {self._with(token)!r} holds the special token {token!r}, which is not text and "
                    f"cannot be banned as text; use suppress_tokens=[{number}]"
                )

    def _with(self, token: str) -> str:
        return next(text for text in self.written if token in text or regex.escape(token) in text)

    def violation(self, row: SequenceState, rule: str, start: int, stop: int, also: Iterable[int] = ()) -> Violation:
        index = row.token_at(start)
        factors = dict.fromkeys((row.ids[index], *also), self.factor)
        return Violation(index, rule, factors, span=(start, stop), **self.repair)

    def tokens_from(self, row: SequenceState, char: int | None) -> int:
        """How many tokens a rewind to `char` would take back, with those that are not text yet."""
        first = row.decoded.done if char is None else min(row.token_at(char), row.decoded.done)
        return len(row.ids) - first


def folded_text(row: SequenceState) -> FoldedText:
    """The row's text as it is compared; all monitors share it."""
    return row.note(FoldedText, FoldedText).follow(row.text)


def word_list(row: SequenceState) -> WordList:
    """The words of the row's text; all monitors share them."""
    return row.note(WordList, WordList).follow(folded_text(row))


class PhraseBan(_Ban):
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
        **repair: object,
    ) -> None:
        super().__init__(strength, **repair)
        if prefer not in ("longest", "shortest"):
            raise InputError(f"prefer={prefer!r} is unknown; use 'longest' or 'shortest'")
        self.written = listed(phrases, "phrase")
        for number, phrase in enumerate(self.written, 1):
            if not bare(fold(phrase)).strip():
                raise InputError(f"phrase {number} ({phrase!r}) is empty and would match everywhere; remove it")
        self.sign = -1 if prefer == "longest" else 1
        self.start_tokens = start_tokens
        self.active = self.active and bool(self.written)
        self.longest = 0
        self.automaton, self.beginnings = ahocorasick.Automaton(), ahocorasick.Automaton()
        for phrase in self.written:
            folded = fold(phrase)
            self.longest = max(self.longest, len(folded))
            self.automaton.add_word(folded, (len(folded), phrase))
            self.beginnings.add_word(bare(folded), True)
        if self.written:
            self.automaton.make_automaton()

    def check(self, row: SequenceState) -> Violation | None:
        if not self.active or len(row.text) <= row.checked:
            return None
        folded = folded_text(row)
        base = max(0, folded.index(row.checked) - self.longest)
        best: tuple[int, int, str, int] | None = None
        for last, (size, phrase) in self.automaton.iter(folded.text[base:]):
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
        also = start_tokens(row.decoded.tokenizer, phrase) if self.start_tokens else ()
        return self.violation(row, f"phrase:{phrase}", start, stop, also)

    def hold(self, row: SequenceState) -> int:
        """Tokens from the earliest place where a phrase may have begun."""
        if not self.active:
            return 0
        folded = folded_text(row)
        base = max(0, len(folded.text) - self.longest)
        tail = folded.text[base:]
        letters = tail if tail.isascii() else [bare(c) for c in tail]
        for offset in range(len(tail)):
            start = base + offset
            if start and folded.starts[start] == folded.starts[start - 1]:
                continue
            if not inside_word(folded.text, start) and self.beginnings.match("".join(letters[offset:])):
                return self.tokens_from(row, folded.starts[start])
        return self.tokens_from(row, None)


class _Read:
    """How far an expression has looked through a text: no match can begin before `first`, whatever follows."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, int]] = [(0, 0)]  # (length of the text then, first)

    @property
    def first(self) -> int:
        return self.marks[-1][1]

    def truncate(self, size: int) -> None:
        self.marks = [(0, 0), *takewhile(lambda mark: mark[0] <= size, self.marks[1:])]

    def go_on(self, pattern: regex.Pattern[str], text: str) -> None:
        """Pass over what is over: matches that end early, and what no match can begin in."""
        if len(text) - self.marks[-1][0] < REREAD or pattern.flags & regex.REVERSE:
            return
        first, last = self.first, len(text) - REREAD  # not the end: `partial` does not see to \B, $ and (?!...)
        for match in pattern.finditer(text, first):
            if match.end() > last:
                break
            first = match.end()
        else:
            begun = pattern.search(text, first, partial=True)
            first = max(first, min(last, begun.start() if begun else last))
        self.marks.append((len(text), first))


class RegexBan(_Ban):
    """Ban regular expressions (ignoring case; `.` matches newlines, `^` and `$` at lines).

    The syntax is that of the package `regex`, which knows whether the end of a text may be the beginning of a match.

    Args:
        patterns: expressions to ban; they see the text as it is, not folded.
        max_span: longest match in characters that is looked for. Needed for streaming: without it nothing can be
            shown before the end.
    """

    def __init__(
        self, patterns: str | Sequence[str], max_span: int | None = None, strength: float = 1.0, **repair: object
    ) -> None:
        super().__init__(strength, **repair)
        if max_span is not None and max_span < 1:
            raise InputError(f"max_span={max_span} is not allowed; give a number of characters >= 1")
        self.max_span = max_span
        self.written = listed(patterns, "regular expression")
        self.patterns = [self._compile(p) for p in self.written]

    @staticmethod
    def _compile(pattern: str) -> regex.Pattern[str]:
        try:
            compiled = regex.compile(pattern, regex.IGNORECASE | regex.MULTILINE | regex.DOTALL)
        except regex.error as error:
            raise InputError(f"the regular expression {pattern!r} does not compile: {error}") from None
        if compiled.search(""):
            raise InputError(f"the regular expression {pattern!r} matches the empty text; make part of it obligatory")
        return compiled

    def check(self, row: SequenceState) -> Violation | None:
        text = row.text
        if not self.active or len(text) <= row.checked:
            return None
        read = [row.note((self, number), _Read) for number in range(len(self.patterns))]
        best: tuple[int, int, str] | None = None
        for pattern, known in zip(self.patterns, read):
            first = known.first if self.max_span is None else max(0, row.checked - self.max_span + 1)
            for match in pattern.finditer(text, first):
                start, stop = match.span()
                too_long = self.max_span is not None and stop - start > self.max_span
                ignored = (row.token_at(start), f"regex:{pattern.pattern}") in row.ignored
                if stop <= row.checked or start == stop or too_long or ignored:
                    continue
                if best is None or start < best[0]:
                    best = (start, stop, pattern.pattern)
                break
        if best is not None:
            return self.violation(row, f"regex:{best[2]}", best[0], best[1])
        for pattern, known in zip(self.patterns, read):
            known.go_on(pattern, text)
        return None

    def hold(self, row: SequenceState) -> int | None:
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


class _Step(NamedTuple):
    """The n-grams that have begun after a word, and those that it completes."""

    stop: int
    begun: Sequence[Begun] = ()
    found: Sequence[Found] = ()


class _Steps:
    """One step for every word but the last, which may still change."""

    def __init__(self) -> None:
        self.made: list[_Step] = []

    def truncate(self, size: int) -> None:
        while self.made and self.made[-1].stop > size:
            self.made.pop()
        del self.made[-1:]  # its word is the last one now


class NGramBan(_Ban):
    """Ban sequences of words: other stop words, numbers and punctuation may stand between them.

    A stop word that an n-gram has itself is needed, and cannot stand between its words.

    Args:
        ngrams: each a text ("sun dipped horizon") or a sequence of words, with a content word at least.
    """

    def __init__(
        self,
        ngrams: str | Sequence[str | Sequence[str]],
        strength: float = 1.0,
        stop_words: frozenset[str] = STOP_WORDS,
        **repair: object,
    ) -> None:
        super().__init__(strength, **repair)
        given = [ngrams] if isinstance(ngrams, str) else ngrams
        self.written = [" ".join(listed(ngram, "word of an n-gram")) for ngram in given]
        found = [tuple(word.text for word in words(text)) for text in self.written]
        self.ngrams = NGrams(found, frozenset(map(fold, listed(stop_words, "stop word"))))
        for text, ngram in zip(self.written, found):
            if all(map(self.ngrams.may_be_passed, ngram)):
                raise InputError(
                    f"the n-gram {text!r} has no content word and would match nearly everywhere; ban it as a phrase"
                )
        self.active = self.active and bool(found)
        self.firsts = sorted(bare(word) for word in self.ngrams.root.children)

    def check(self, row: SequenceState) -> Violation | None:
        if not self.active or len(row.text) <= row.checked:
            return None
        steps, last = self._steps(row)
        new = takewhile(lambda step: step.stop > row.checked, chain((last,), reversed(steps)))
        best = min(
            (
                (start, -len(ngram), ngram, step.stop)
                for step in new
                for ngram, start in step.found
                if (row.token_at(start), _rule(ngram)) not in row.ignored
            ),
            default=None,
        )
        return None if best is None else self.violation(row, _rule(best[2]), best[0], best[3])

    def hold(self, row: SequenceState) -> int:
        """Tokens from the earliest word that may have begun a banned n-gram."""
        if not self.active:
            return 0
        steps, last = self._steps(row)
        starts = [start for _, start, _ in last.begun]
        known = word_list(row)
        if known.open:  # the last word may become one to pass over, or one that begins an n-gram
            word = known.words[-1]
            starts += [start for _, start, _ in (steps[-1].begun if steps else ())]
            place = bisect_left(self.firsts, bare(word.text))
            starts += [word.start for first in self.firsts[place : place + 1] if first.startswith(bare(word.text))]
        return self.tokens_from(row, min(starts, default=None))

    def _steps(self, row: SequenceState) -> tuple[list[_Step], _Step]:
        """The steps of all words but the last, and that of the last."""
        found = word_list(row).words
        made = row.note(self, _Steps).made
        for word in found[len(made) : -1]:
            made.append(self._step(made, word))
        return made, self._step(made, found[-1]) if found else _Step(0)

    def _step(self, made: list[_Step], word: Word) -> _Step:
        return _Step(word.stop, *self.ngrams.step(made[-1].begun if made else (), word))


def _rule(ngram: Sequence[str]) -> str:
    return "ngram:" + " ".join(ngram)


class Antislop(LoopMethod):
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
    ngrams: Lines = Field(
        (), description="sequences of words to ban, stop words may stand between, or a file with one a line"
    )
    strength: Probability = Field(1.0, description="probability factor 10^(-10 s); 1 bans, 0 does nothing")
    prefer: Literal["longest", "shortest"] = Field("longest", description="which phrase counts at one start")
    start_tokens: bool = Field(
        False, description="lower every token that a phrase can start with, not only the rejected one (local sampler)"
    )
    max_span: Count | None = Field(None, description="longest regex match in characters; needed for streaming")
    force_backtrack: bool = Field(False, description="drop temperature, min-p, top-p and top-k rather than give up")
    invert_probs: bool = Field(False, description="favor unlikely replacements")
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
            made.append(PhraseBan(self.phrases, self.strength, self.prefer, self.start_tokens, **repair))
        if self.regexes:
            made.append(RegexBan(self.regexes, self.max_span, self.strength, **repair))
        if self.ngrams:
            made.append(NGramBan(self.ngrams, self.strength, **repair))
        return made

    def plugins(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Plugins:
        return Plugins(monitors=self.monitors())


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
            piece = tokenizer.decode(ids)
            prefixes = [piece[:n] for n in range(1, len(piece)) if piece[:n].strip()]
            for token in ids + [t for p in prefixes for t in tokenizer.encode(p, add_special_tokens=False)[:1]]:
                if token not in special and tokenizer.decode([token]).strip():
                    found[token] = None
    return tuple(found)
