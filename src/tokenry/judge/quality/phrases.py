"""Phrases of a translation by its dependency tree, as people who mark errors take whole ones.

A tree is a list of heads, counted from 1, with 0 for the root; or a spaCy `Doc` or `Span`, or a stanza `Sentence`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from ...core.errors import InputError

__all__ = ["Phrase", "Severity", "heads_of", "mqm_score", "phrase_labels", "shortest_phrase_cover"]

Severity = Literal["ok", "minor", "major", "critical"]
ORDER: tuple[Severity, ...] = ("ok", "minor", "major", "critical")
Weights = tuple[float, float, float]  # of minor, major and critical errors


class Phrase(NamedTuple):
    """Words from `start` to `stop`, without it, and the worst severity among them."""

    start: int
    stop: int
    severity: Severity


def heads_of(tree: Any, words: Sequence[str]) -> list[int]:
    """The heads of the words of a sentence by their tree.

    Raises:
        InputError: one text instead of words, another tree than of these words, heads out of range, no root or two, or
            a cycle.
    """
    if hasattr(tree, "sentences"):  # a stanza Document
        if len(tree.sentences) != 1:
            raise InputError(f"the tree has {len(tree.sentences)} sentences; parse the words as one, already tokenized")
        tree = tree.sentences[0]
    if isinstance(words, str):
        raise InputError(f"the words are one text, {words[:40]!r}; give a list of words, such as text.split()")
    named = None
    if hasattr(tree, "words"):  # stanza
        named, heads = [word.text for word in tree.words], [word.head for word in tree.words]
    elif len(tree) and hasattr(tree[0], "head"):  # spaCy, whose root is its own head
        named, first = [token.text for token in tree], tree[0].i
        heads = [0 if token.head.i == token.i else token.head.i - first + 1 for token in tree]
    else:
        heads = list(tree)
    if named is not None and named != list(words):
        raise InputError(
            f"the tree is of the words {' '.join(named)[:60]!r}, the translation has {' '.join(words)[:60]!r}; parse "
            "its words without tokenizing them again"
        )
    if len(heads) != len(words):
        raise InputError(f"there are {len(heads)} heads for {len(words)} words; give one for each word")
    check_heads(heads)
    return heads


def check_heads(heads: Sequence[int]) -> None:
    """Refuse heads that are no tree with one root."""
    count = len(heads)
    for i, head in enumerate(heads, 1):
        if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head <= count:
            raise InputError(f"the head of word {i} is {head!r}; give a number from 0, the root, to {count}")
    roots = [i for i, head in enumerate(heads, 1) if head == 0]
    if len(roots) != 1:
        raise InputError(f"the tree has {len(roots)} roots; give one word the head 0")
    for i in range(1, count + 1):
        if len(_upwards(heads, i)) > count:
            raise InputError(f"the heads of word {i} run in a circle; give a tree")


def _upwards(heads: Sequence[int], word: int) -> list[int]:
    """The word and all above it, counted from 1; longer than there are words where they run in a circle."""
    path = [word]
    while heads[path[-1] - 1] and len(path) <= len(heads):
        path.append(heads[path[-1] - 1])
    return path


def shortest_phrase_cover(heads: Sequence[int], first: int, last: int) -> tuple[int, int]:
    """The shortest span around words `first` to `last` (from 0, both inside) that is whole in the tree.

    Until nothing changes, it takes in the words on the tree's paths from its own up to their lowest common ancestor,
    and all words between the first and the last of these.

    Returns:
        The first and the last word of the span.
    """
    while True:
        paths = [_upwards(heads, word + 1) for word in range(first, last + 1)]
        shared = next(word for word in paths[0] if all(word in path for path in paths))
        above = [word - 1 for path in paths for word in path[: path.index(shared) + 1]]
        wider = min(above), max(above)
        if wider == (first, last):
            return wider
        first, last = wider


def phrase_labels(severities: Sequence[Severity], heads: Sequence[int] | None = None) -> list[Phrase]:
    """The phrases that are not ok, from left to right: each run of such words, widened to a whole one.

    A phrase has the worst severity of its words. A run that lies within a phrase is part of it.

    Args:
        heads: of the words, see `heads_of`; without them runs stay as they are.

    Raises:
        InputError: as many heads as words are not there.
    """
    if heads is not None and len(heads) != len(severities):
        raise InputError(f"there are {len(heads)} heads for {len(severities)} words; give one for each word")
    found, i = [], 0
    while i < len(severities):
        if severities[i] == "ok":
            i += 1
            continue
        last = i
        while last + 1 < len(severities) and severities[last + 1] != "ok":
            last += 1
        start, last = (i, last) if heads is None else shortest_phrase_cover(heads, i, last)
        found.append(Phrase(start, last + 1, worst(severities[start : last + 1])))
        i = last + 1
    return found


def worst(severities: Sequence[Severity]) -> Severity:
    """The worst of some."""
    return ORDER[max(map(ORDER.index, severities))]


def mqm_score(phrases: Sequence[Phrase], words: int, weights: Weights = (0.1, 1.0, 5.0)) -> float:
    """1 - the weights of all phrases / the number of words; below 0 where errors are many.

    Raises:
        InputError: no words.
    """
    if words < 1:
        raise InputError("the translation is empty; give one with words")
    by_severity = dict(zip(ORDER, (0.0, *weights)))
    return 1 - sum(by_severity[phrase.severity] for phrase in phrases) / words
