"""The rule that looks ahead: where several entries begin the rest of a word, the one of the highest score is taken.

The score of an entry is its length in characters, and more where the word ends with it, or where a suffix follows. Of
equal scores roots go before suffixes and these before subwords, then the longer entry. This is the rule of the versions
from 1.0 on of turkish-tokenizer, the package of arXiv 2508.14292; here it looks at the rest of a word up to the next
upper-case letter. The library tokenizers has no model for it, so a pre-tokenizer in Python cuts words into entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers

from .pipeline import JOINED, to_bytes

__all__ = ["look_ahead"]

BONUS = 5  # for an entry that ends the word
LEAST = 2  # characters of a suffix behind an entry that count
RANKS = {"root": 0, "suffix": 1, "subword": 2, "letter": 3}
CONTINUING = frozenset(to_bytes(chr(n))[1] for n in range(0x80, 0xC0))  # bytes that begin no character


def look_ahead(tokenizer: Tokenizer, kinds: Mapping[str, str]) -> None:
    """Give a pipeline the rule. It cannot be saved with it.

    Args:
        kinds: {string of an entry: its kind}; what is no root, suffix, subword or letter is left out.
    """
    cutter = _Cutter({entry: kind for entry, kind in kinds.items() if kind in RANKS and JOINED not in entry})
    cuts = pre_tokenizers.PreTokenizer.custom(cutter)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([tokenizer.pre_tokenizer, cuts])


class _Cutter:
    """Cuts words, whose bytes are characters, into entries.

    Args:
        kinds: {entry: its kind}.
    """

    def __init__(self, kinds: Mapping[str, str]) -> None:
        text = decoders.ByteLevel()
        self.known = {entry: (len(text.decode([entry])), RANKS[kind]) for entry, kind in kinds.items()}
        self.longest = max(map(len, self.known), default=0)
        self.longest_suffix = max((len(entry) for entry, kind in kinds.items() if kind == "suffix"), default=0)

    def pre_tokenize(self, pretokenized: Any) -> None:
        pretokenized.split(lambda _, word: [word[begin:end] for begin, end in self.cuts(str(word.normalized))])

    def cuts(self, word: str) -> Iterator[tuple[int, int]]:
        """Where the entries of a word begin and end; what no entry begins is a character."""
        at = 0
        while at < len(word):
            end = self._best(word, at)
            yield at, end
            at = end

    def _best(self, word: str, at: int) -> int:
        """The end of the entry to take."""
        found, best = at + 1, ()
        while found < len(word) and word[found] in CONTINUING:
            found += 1
        for end in range(at + 1, min(len(word), at + self.longest) + 1):
            if word[at:end] in self.known:
                length, rank = self.known[word[at:end]]
                score = (length + self._ahead(word, end), -rank, length)
                if score > best:
                    found, best = end, score
        return found

    def _ahead(self, word: str, at: int) -> int:
        """What the rest of the word adds."""
        if at == len(word):
            return BONUS
        for end in range(min(len(word), at + self.longest_suffix), at, -1):
            length, rank = self.known.get(word[at:end], (0, -1))
            if rank == RANKS["suffix"]:
                return length if length >= LEAST else 0
        return 0
