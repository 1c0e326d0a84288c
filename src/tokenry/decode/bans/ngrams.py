"""Banned n-grams: word by word, what has begun and what is complete."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain, takewhile
from typing import NamedTuple

from ...core.errors import InputError
from ...text.ngrams import Begun, Found, NGrams
from ...text.words import STOP_WORDS, Word, bare, fold, listed, words
from ..generation.monitor import Violation
from ..generation.sequence import SequenceState
from .ban import Ban, word_list

__all__ = ["NGramBan"]


class NGramBan(Ban):
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


class _Steps:
    """One step for every word but the last, which may still change."""

    def __init__(self) -> None:
        self.made: list[_Step] = []

    def truncate(self, size: int) -> None:
        while self.made and self.made[-1].stop > size:
            self.made.pop()
        del self.made[-1:]  # its word is the last one now


class _Step(NamedTuple):
    """The n-grams that have begun after a word, and those that it completes."""

    stop: int
    begun: Sequence[Begun] = ()
    found: Sequence[Found] = ()
