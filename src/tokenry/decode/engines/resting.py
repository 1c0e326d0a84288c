"""What need not be read again of a new text: beginnings of texts that are being written, and of some that are over.

A text that is over rests: what was computed of it is kept, in a bounded amount of memory, for texts that begin like it,
until others need the memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np

__all__ = ["LEAST", "Rest", "Resting", "Tokens", "common_beginning", "longest_beginning", "pays"]

MOST = 256  # texts that rest
LEAST = 64  # tokens: what is shorter is as quickly read, with others that begin at the same time

Tokens: TypeAlias = "np.ndarray | array[int]"
State = TypeVar("State")
Name = TypeVar("Name")


def common_beginning(one: Tokens, two: Tokens) -> int:
    """How many first tokens two texts have in common."""
    length = min(len(one), len(two))
    differ = np.asarray(one)[:length] != np.asarray(two)[:length]
    return int(differ.argmax()) if differ.any() else length


def longest_beginning(texts: Mapping[Name, Tokens], prompt: Tokens) -> tuple[Name | None, int]:
    """The text with which a prompt has the most first tokens in common, the newest of several; and how many these are,
    at most all but the prompt's last one, whose logits are wanted."""
    found, most = None, 0
    for name, tokens in texts.items():
        common = common_beginning(tokens, prompt[:-1])
        if common and common >= most:
            found, most = name, common
    return found, most


def pays(common: int, length: int) -> bool:
    """Whether it is worth while to go on from `common` tokens of a prompt: new ones are read together, and what goes on
    from different places is not."""
    return common >= max(LEAST, length - common)


class Rest(NamedTuple, Generic[State]):
    """A text that is over: its tokens, what was computed of them, and the bytes of that."""

    tokens: np.ndarray
    state: State
    size: int


class Resting(Generic[State]):
    """Texts that are over, of which the least recently used ones are dropped.

    Args:
        memory: bytes that they may take together; 0: none is kept.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.rests: dict[int, Rest[State]] = {}  # the least recently used first
        self.count = 0

    @property
    def size(self) -> int:
        """Bytes of all."""
        return sum(rest.size for rest in self.rests.values())

    def longest(self, prompt: Tokens) -> tuple[int | None, int]:
        """As `longest_beginning`."""
        return longest_beginning({number: rest.tokens for number, rest in self.rests.items()}, prompt)

    def use(self, number: int) -> Rest[State]:
        """One of them, which is now the most recently used."""
        rest = self.rests[number] = self.rests.pop(number)
        return rest

    def wants(self, tokens: Sequence[int] | Tokens) -> bool:
        """Whether a text is worth keeping: it has tokens enough, and more than a few that none of these has."""
        if not self.memory or len(tokens) < LEAST:
            return False
        for number, rest in self.rests.items():
            if len(rest.tokens) >= len(tokens) and _is_alike(tokens, rest.tokens):
                self.use(number)
                return False
        return True

    def add(self, rest: Rest[State]) -> None:
        """Keep a text, in place of those that have hardly more than a beginning of it."""
        for number in [number for number, one in self.rests.items() if _is_alike(one.tokens, rest.tokens)]:
            del self.rests[number]
        self.count += 1
        self.rests[self.count] = rest
        while self.size > self.memory or len(self.rests) > MOST:
            del self.rests[next(iter(self.rests))]


def _is_alike(one: Sequence[int] | Tokens, other: Tokens) -> bool:
    """Whether a text has fewer than `LEAST` tokens behind what it has in common with another one."""
    return len(one) - common_beginning(np.asarray(one), other) < LEAST
