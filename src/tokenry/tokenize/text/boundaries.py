"""Where a tokenizer cuts inside words, against where it should."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from ...core.errors import InputError
from ...core.fields import shown

__all__ = ["Cuts", "cuts_in_text", "inner_cuts"]


class Cuts(NamedTuple):
    """Cuts inside words: `shared` of those that were `made` are among the `gold` ones."""

    shared: int
    made: int
    gold: int

    def __add__(self, other: Cuts) -> Cuts:  # type: ignore[override]
        return Cuts(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def precision(self) -> float:
        return self.shared / self.made if self.made else float("nan")

    @property
    def recall(self) -> float:
        return self.shared / self.gold if self.gold else float("nan")

    @property
    def f1(self) -> float:
        """2 shared / (made + gold); words without a cut in either count as neither."""
        return 2 * self.shared / (self.made + self.gold) if self.made + self.gold else float("nan")


def inner_cuts(parts: Sequence[str]) -> set[int]:
    """Characters of the word at which its parts begin, but for the first one.

    Raises:
        InputError: a word that is not cut into a list.
    """
    if isinstance(parts, str):
        raise InputError(f"the word {shown(parts)} is one string; give its parts in a list, for example [{parts!r}]")
    ends, at = set(), 0
    for part in parts[:-1]:
        at += len(part)
        ends.add(at)
    return ends


def cuts_in_text(text: str, words: Sequence[Sequence[str]], ends: Collection[int]) -> Cuts:
    """Cuts inside the words of a text that are letters alone.

    Args:
        words: in their order in the text, each as its parts.
        ends: characters of the text at which tokens end.
    """
    found, at, cut_at = Cuts(0, 0, 0), 0, set(ends)
    for parts in words:
        word, inner = "".join(parts), inner_cuts(parts)
        place = text.find(word, at)
        if place < 0:  # written otherwise in the text
            continue
        at = place
        if word.isalpha():
            gold = {at + cut for cut in inner}
            made = {end for end in range(at + 1, at + len(word)) if end in cut_at}
            found += Cuts(len(made & gold), len(made), len(gold))
        at += len(word)
    return found
