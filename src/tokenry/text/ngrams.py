"""N-grams found word by word: their words in order, with stop words, numbers and punctuation between them.

A word that an n-gram has itself cannot stand between its words, stop word or not: "could feel" is found in "could not
feel" and not in "feel". All n-grams are looked for at once; what a word costs does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .words import STOP_WORDS, Word, is_alphabetic

NGram = tuple[str, ...]


class _Node:
    """The first words of some n-grams.

    Attributes:
        kept: the words that may stand between words elsewhere, but in none of these n-grams.
        ngram: the n-gram that is complete here, and `own` those words of it.
    """

    __slots__ = ("children", "kept", "ngram", "own")

    def __init__(self, kept: frozenset[str] = frozenset()) -> None:
        self.children: dict[str, _Node] = {}
        self.kept = kept
        self.ngram: NGram | None = None
        self.own: frozenset[str] = frozenset()


class Begun(NamedTuple):
    """An n-gram that has begun: how far it is, where, and which words that others need were passed over."""

    node: _Node
    start: int
    passed: frozenset[str]


class Found(NamedTuple):
    """A whole n-gram and where it began."""

    ngram: NGram
    start: int


class NGrams:
    """A set of n-grams, each a sequence of folded words."""

    def __init__(self, ngrams: Iterable[Sequence[str]], stop_words: frozenset[str] = STOP_WORDS) -> None:
        self.stop_words = stop_words
        self.root = _Node()
        self.kept: set[str] = set()  # what any of them keeps
        for ngram in ngrams:
            self._add(tuple(ngram))

    def may_be_passed(self, word: str) -> bool:
        """Whether the word may stand between the words of n-grams that do not have it."""
        return word in self.stop_words or not is_alphabetic(word)

    def step(self, begun: Iterable[Begun], word: Word) -> tuple[list[Begun], list[Found]]:
        """The n-grams that have begun after one more word, and those that it completes."""
        passed_over = self.may_be_passed(word.text)
        going: list[Begun] = []
        found: list[Found] = []
        for node, start, passed in (*begun, Begun(self.root, word.start, frozenset())):
            child = node.children.get(word.text)
            if child is not None and child.ngram is not None and not passed & child.own:
                found.append(Found(child.ngram, start))
            if child is not None and child.children and not passed & child.kept:
                going.append(Begun(child, start, passed))
            if passed_over and node is not self.root and word.text not in node.kept:
                going.append(Begun(node, start, passed | self.kept.intersection((word.text,))))
        return going, found

    def _add(self, ngram: NGram) -> None:
        own = frozenset(word for word in ngram if self.may_be_passed(word))
        self.kept |= own
        node = self.root
        for word in ngram:
            node = node.children.setdefault(word, _Node(own))
            node.kept &= own
        node.ngram, node.own = ngram, own
