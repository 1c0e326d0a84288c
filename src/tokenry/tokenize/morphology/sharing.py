"""Which ids of forms give way to the id that the forms of their morpheme share, in many words at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np

from .forms import REACH, Choice

__all__ = ["MOST", "Memo", "Sharing"]

K = TypeVar("K")
V = TypeVar("V")
MOST = 2**17  # things that are remembered of a kind


class Memo(dict[K, V], Generic[K, V]):
    """What a function says, remembered. Reading it is as fast as reading a dictionary."""

    def __init__(self, make: Callable[[K], V]) -> None:
        self.make = make

    def __missing__(self, key: K) -> V:
        self[key] = value = self.make(key)
        return value

    def shrink(self) -> None:
        """Forget everything where it has become much."""
        if len(self) > MOST:
            self.clear()


class Sharing:
    """Decides for each form in its word whether decoding would choose it, so that the shared id is enough.

    What a form asks of the letters around it is asked once for the same letters: the answers are the bits of a number,
    one number for the letters before it and one for the piece behind it.

    Args:
        texts: {id: the letters that it stands for}; none for marks, and no id twice.
        shared: {id of a form: the id that it shares}.
        choices: {shared id: its forms}.
        first: {id: the form that stands for all}, which is what is seen of a piece behind.
        space: the id between words.
    """

    def __init__(
        self,
        texts: Mapping[int, str],
        shared: Mapping[int, int],
        choices: Mapping[int, Choice],
        first: Mapping[int, str],
        space: int,
    ) -> None:
        size = max(texts) + 1
        self.space, self.shared, self.first = space, shared, first
        self.texts = [texts.get(id, "") for id in range(size)]
        self.lengths = np.array([len(text) for text in self.texts])
        self.known = np.full(size + 1, space)  # ids that are none of ours stand between words
        self.known[list(texts)] = list(texts)
        self.target = np.arange(size)
        self.target[list(shared)] = list(shared.values())
        self.sides = [*dict.fromkeys(side for one in choices.values() for _, asked in one.tried for side in asked)]
        bit = {side: 1 << n for n, side in enumerate(self.sides)}
        self.tried = {
            id: [(form, sum({bit[side] for side in asked})) for form, asked in one.tried] for id, one in choices.items()
        }
        nothing = re.compile("")
        self.asked = [(1 << n, (side.after or nothing).search, side.stems) for n, side in enumerate(self.sides)]
        self.left, self.behind = Memo(self._before), Memo(self._after)
        self.stands = Memo(self._stands)

    def __call__(self, ids: np.ndarray, guard: bool, alone: Sequence[int] = ()) -> np.ndarray:
        """As many ids as there were.

        Args:
            guard: False: every form gives way.
            alone: further ids that stand between words.
        """
        mine = self.known[np.minimum(ids, len(self.known) - 1)]
        at = np.flatnonzero(self.target[mine] != mine)
        if guard and len(at):
            at = at[self._fit(mine, at, np.isin(mine, [self.space, *alone]))]
        out = ids.copy()
        out[at] = self.target[mine[at]]
        return out

    def _fit(self, ids: np.ndarray, at: np.ndarray, between: np.ndarray) -> np.ndarray:
        """Whether decoding chooses the forms at these places."""
        for memo in (self.left, self.behind, self.stands):
            memo.shrink()
        text = "".join(map(self.texts.__getitem__, ids.tolist()))
        ends = np.cumsum(self.lengths[ids])
        starts = (ends - self.lengths[ids])[at]
        words = np.maximum.accumulate(np.where(between, ends, 0))[at]  # where the word of each begins
        before = zip(np.maximum(words, starts - REACH).tolist(), starts.tolist())
        left = [self.left[text[begin:end]] for begin, end in before]
        behind = np.append(np.where(between, self.space, ids), self.space)[at + 1]
        pieces = map(self.behind.__getitem__, behind.tolist())
        return np.fromiter(map(self.stands.__getitem__, zip(ids[at].tolist(), left, pieces)), bool, len(at))

    def _before(self, left: str) -> int:
        mask = 0
        for bit, search, stems in self.asked:
            if search(left) or left in stems:
                mask |= bit
        return mask

    def _after(self, id: int) -> int:
        behind = "" if id == self.space else self.first[id]
        return sum([1 << n for n, side in enumerate(self.sides) if side.precedes(behind)])

    def _stands(self, place: tuple[int, int, int]) -> bool:
        id, left, behind = place
        missing = ~(left & behind)
        return next(form for form, asked in self.tried[self.shared[id]] if not asked & missing) == self.texts[id]
