"""The rule that looks ahead: where several entries begin the rest of a word, the one of the highest score is taken.

The score of an entry is its length in characters, and more where the word ends with it, or where a suffix follows. Of
equal scores roots go before suffixes and these before subwords, then the longer entry. This is the rule of the versions
from 1.0 on of turkish-tokenizer, the package of arXiv 2508.14292; here it looks at the rest of a word up to the next
upper-case letter. The library tokenizers has no model for it, so a pre-tokenizer in Python cuts words into entries.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers

from .pipeline import JOINED, MARK, SPACE, to_bytes
from .sharing import Memo

__all__ = ["Cutter", "look_ahead"]

V = TypeVar("V")
BONUS = 5  # for an entry that ends the word
LEAST = 2  # characters of a suffix behind an entry that count
RANKS = {"root": 0, "suffix": 1, "subword": 2, "letter": 3}
PIECES = re.compile(f"[{MARK}{to_bytes(SPACE)}]|[^{MARK}{to_bytes(SPACE)}]+")
CONTINUING = frozenset(to_bytes(chr(n))[1] for n in range(0x80, 0xC0))  # bytes that begin no character


def look_ahead(tokenizer: Tokenizer, kinds: Mapping[str, str]) -> Cutter:
    """Give a pipeline the rule. It cannot be saved with it.

    Args:
        kinds: {string of an entry: its kind}; what is no root, suffix, subword or letter is left out.
    """
    cutter = Cutter(
        {entry: kind for entry, kind in kinds.items() if kind in RANKS and JOINED not in entry}, tokenizer.get_vocab()
    )
    cuts = pre_tokenizers.PreTokenizer.custom(cutter)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, cuts])
    return cutter


class Cutter:
    """Cuts words, whose bytes are characters, into entries.

    What the rest of a word is cut into does not depend on what is before it, so each rest is cut once.

    Args:
        kinds: {entry: its kind}.
        vocabulary: {entry, mark or byte: its id}.
    """

    def __init__(self, kinds: Mapping[str, str], vocabulary: Mapping[str, int]) -> None:
        text = decoders.ByteLevel()
        self.vocabulary = vocabulary
        known = {entry: (len(text.decode([entry])), RANKS[kind]) for entry, kind in kinds.items()}
        self.known = _with_beginnings(known, ())
        self.suffixes = _with_beginnings(
            {e: length for e, (length, rank) in known.items() if rank == RANKS["suffix"]}, 0
        )
        self.ahead, self.cut = Memo(self._ahead), Memo(self._cut)

    def pre_tokenize(self, pretokenized: Any) -> None:
        pretokenized.split(lambda _, word: [word[begin:end] for begin, end in self.cuts(str(word.normalized))])

    def cuts(self, word: str) -> Iterator[tuple[int, int]]:
        """Where the entries of a word begin and end; what no entry begins is a character."""
        at = 0
        while at < len(word):
            end = at + self._best(word[at:])
            yield at, end
            at = end

    def ids(self, text: str) -> np.ndarray:
        """The ids of words, marks and spaces."""
        self.ahead.shrink()
        self.cut.shrink()
        return np.fromiter(chain.from_iterable(map(self.cut.__getitem__, PIECES.findall(text))), np.int64)

    def _cut(self, rest: str) -> tuple[int, ...]:
        """The ids of the rest of a word."""
        end = self._best(rest)
        id = self.vocabulary.get(rest[:end])
        first = (id,) if id is not None else tuple(self.vocabulary[byte] for byte in rest[:end])
        return first + self.cut[rest[end:]] if end < len(rest) else first

    def _best(self, rest: str) -> int:
        """The end of the entry that the rest of a word begins with."""
        found, best = 1, 0
        while found < len(rest) and rest[found] in CONTINUING:
            found += 1
        for end in range(1, len(rest) + 1):
            entry = self.known.get(rest[:end])
            if entry is None:
                break
            if entry:
                length, rank = entry
                score = 4 * (length + self.ahead[rest[end:]]) - rank
                if score >= best:  # of equal ones the longer
                    found, best = end, score
        return found

    def _ahead(self, rest: str) -> int:
        """What the rest of a word adds to the entry before it."""
        if not rest:
            return BONUS
        longest = 0
        for end in range(1, len(rest) + 1):
            length = self.suffixes.get(rest[:end])
            if length is None:
                break
            longest = length or longest
        return longest if longest >= LEAST else 0


def _with_beginnings(found: Mapping[str, V], nothing: V) -> dict[str, V]:
    """The same, and nothing for what only begins one of them: where there is none, nothing longer follows."""
    return dict.fromkeys((string[:end] for string in found for end in range(1, len(string))), nothing) | dict(found)
