"""Words as a person sees them: folding with a map back to the text, word boundaries (UAX 29), English stop words.

Texts, patterns and counts are folded by one function, `fold`: equal are upper and lower case (ß and SS, İ and i too),
a letter and the same letter with its marks apart (NFC and NFD), ' and ’, and all kinds of spaces.
"""

from __future__ import annotations

import unicodedata
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import regex

from ..core.errors import InputError

LETTERS = r"\p{L}\p{N}\p{M}\u200c\u200d"  # with what joins or parts letters without showing
WORD = regex.compile(rf"[\p{{L}}\p{{N}}](?:\B[{LETTERS}'])*", regex.WORD)
GROWING = regex.compile(r"['\p{M}\u200c\u200d]*\Z")  # after a word: the next character may still belong to it
BOUNDARY = regex.compile(r"\b", regex.WORD)
ALPHABETIC = regex.compile(r"[\p{L}\p{M}\u200c\u200d]+")
MARKS = regex.compile(r"\p{M}+")
CHARACTERS = regex.compile(r"[\x00-\x0c\x0e-\x7f]+(?=[\x00-\x7f]|\Z)|\X")  # of a run of ASCII each is one
ALIKE = str.maketrans(
    dict.fromkeys("’ʼ＇", "'") | {c: " " for c in map(chr, range(0x3001)) if unicodedata.category(c) == "Zs"}
)

STOP_WORDS = frozenset(
    """a about above after again against all am an and any are aren't as at be because been before being below
    between both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during each few
    for from further had hadn't has hasn't have haven't having he he'd he'll he's her here here's hers herself him
    himself his how how's i i'd i'll i'm i've if in into is isn't it it's its itself just let's me more most mustn't
    my myself no nor not now of off on once only or other ought our ours ourselves out over own same shan't she she'd
    she'll she's should shouldn't so some such than that that's the their theirs them themselves then there there's
    these they they'd they'll they're they've this those through to too under until up very was wasn't we we'd we'll
    we're we've were weren't what what's when when's where where's which while who who's whom why why's will with
    won't would wouldn't you you'd you'll you're you've your yours yourself yourselves""".split()
)


class Word(NamedTuple):
    """A folded word, and where it stands in the text."""

    text: str
    start: int
    stop: int


# --- folding -------------------------------------------------------------------------------------------------------


def fold(text: str) -> str:
    """The text as it is compared."""
    return _fold(text)[0]


def bare(folded: str) -> str:
    """Folded text without marks: with this begins whatever its last character may become as more marks follow."""
    return folded if folded.isascii() else MARKS.sub("", unicodedata.normalize("NFD", folded))


def _fold(text: str, offset: int = 0) -> tuple[str, list[int]]:
    """The folded text and, for each of its characters, `offset` + where the character begins that it comes from."""
    if text.isascii():
        return text.lower(), list(range(offset, offset + len(text)))
    parts: list[str] = []
    starts: list[int] = []
    for match in CHARACTERS.finditer(text):
        part, first = match.group(), offset + match.start()
        if part.isascii():
            parts.append(part.lower())
            starts += range(first, first + len(part))
        else:
            parts.append(_fold_character(part))
            starts += [first] * len(parts[-1])
    return "".join(parts), starts


@lru_cache(maxsize=8192)
def _fold_character(character: str) -> str:
    folded = unicodedata.normalize("NFD", character).casefold().replace("i\u0307", "i")  # İ has its dot apart
    return unicodedata.normalize("NFC", folded.translate(ALIKE))


class FoldedText:
    """A growing and shrinking text, folded. Only its last character and what is new are folded again.

    `starts[i]` is where the character begins that character i of the folded `text` comes from.
    """

    def __init__(self, text: str = "") -> None:
        self.text, self.size, self.cut = "", 0, False
        self.starts: list[int] = []
        self.follow(text)

    def follow(self, text: str) -> FoldedText:
        """Be the folded form of `text`, which begins as the text before it did, up to where that was truncated."""
        if self.cut or len(text) != self.size:
            last = self.starts[-1] if self.starts else 0  # marks may follow the character that was the last one
            self._cut(last)
            folded, starts = _fold(text[last:], last)
            self.text, self.size, self.cut = self.text + folded, len(text), False
            self.starts += starts
        return self

    def truncate(self, size: int) -> None:
        """Forget what the text has from character `size` on."""
        if size < self.size:
            self._cut(size)
            self.size, self.cut = size, True  # the last character may have lost its marks

    def index(self, character: int) -> int:
        """The first folded character that comes from `character` of the text or a later one."""
        return bisect_left(self.starts, character)

    def span(self, start: int, stop: int) -> tuple[int, int] | None:
        """Where folded characters stand in the text; None if they begin or end inside a character of it."""
        starts = self.starts
        if start and starts[start] == starts[start - 1]:
            return None
        if stop == len(starts):
            return starts[start], self.size
        return None if starts[stop] == starts[stop - 1] else (starts[start], starts[stop])

    def _cut(self, size: int) -> None:
        count = self.index(size)
        self.text = self.text[:count]
        del self.starts[count:]


# --- words ---------------------------------------------------------------------------------------------------------


def is_word_character(char: str) -> bool:
    """Letters, numbers and marks."""
    return unicodedata.category(char)[0] in "LNM"


def inside_word(text: str, place: int) -> bool:
    """Whether a word goes on from before `place` to after it: letters of scripts without spaces are words apart."""
    if not 0 < place < len(text) or not (is_word_character(text[place]) and is_word_character(text[place - 1])):
        return False
    return BOUNDARY.match(text, place) is None


class WordList:
    """The words of a growing and shrinking text. Only its last word and what is new are looked through again.

    `open` says whether the last of `words` may still grow.
    """

    def __init__(self) -> None:
        self.words: list[Word] = []
        self.open = self.cut = False
        self.size = self.scanned = 0

    def follow(self, folded: FoldedText) -> WordList:
        """Have the words of a text that begins as the text before it did, up to where that was truncated."""
        if not self.cut and folded.size == self.size:
            return self
        text = folded.text
        first = folded.index(self.words.pop().start if self.words and self.open else self.scanned)
        for match in WORD.finditer(text, first):
            end = match.end()
            stop = folded.starts[end] if end < len(text) else folded.size
            self.words.append(Word(match.group(), folded.starts[match.start()], stop))
        self.open = bool(self.words) and GROWING.match(text, folded.index(self.words[-1].stop)) is not None
        self.size, self.scanned, self.cut = folded.size, folded.starts[-1] if folded.starts else 0, False
        return self

    def truncate(self, size: int) -> None:
        """Forget what the text has from character `size` on."""
        if size < self.size:
            while self.words and self.words[-1].stop > size:
                self.words.pop()
            self.open, self.cut, self.size, self.scanned = True, True, size, 0


def words(text: str) -> list[Word]:
    """The words of a text, with numbers; parted by Unicode's word boundaries, by underscores, points and colons."""
    return WordList().follow(FoldedText(text)).words


def is_alphabetic(word: str) -> bool:
    """Letters and their marks alone."""
    return ALPHABETIC.fullmatch(word) is not None


def content_words(text: str, stop_words: frozenset[str] = STOP_WORDS) -> Iterator[Word]:
    """Every alphabetic word that is not a stop word."""
    return (word for word in words(text) if is_alphabetic(word.text) and word.text not in stop_words)


# --- lists of texts ------------------------------------------------------------------------------------------------


def listed(texts: str | Iterable[str], name: str) -> list[str]:
    """The texts as a list; a single text is a list of one.

    Raises:
        InputError: one of them is not a text.
    """
    found = [texts] if isinstance(texts, str) else list(texts)
    for number, text in enumerate(found, 1):
        if not isinstance(text, str):
            raise InputError(f"{name} {number} is of type {type(text).__name__}, not text; give a list of texts")
    return found
