"""The open tokens of one sequence of llama.cpp: a draft tree, each of whose branches is a sequence that shares cells.

A token of several branches is fed once, in all of their sequences. What comes on top of tokens that were fed before
goes on in a sequence that ends there, or in a new one that shares the way to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

__all__ = ["Branches", "Drafted", "Entry"]

ROOT = -1  # the last token that is not open


class Pool(Protocol):
    """Where the sequences are, see `Sequences`."""

    lengths: dict[int, int]
    shared: int

    def branch(self, slot: int, stop: int) -> int: ...

    def adopt(self, slot: int, branch: int, stop: int) -> None: ...

    def drop(self, branches: Sequence[int]) -> None: ...

    def cut(self, slot: int, length: int) -> None: ...


class Entry(NamedTuple):
    """A token to feed: its place, the sequences that it is in, and whether its logits are wanted."""

    token: int
    position: int
    slots: Sequence[int]
    wanted: bool


class Drafted(NamedTuple):
    """A token of a tree, its column, and the column that it follows."""

    column: int
    token: int
    parent: int


@dataclass
class Node:
    """`slot`: a sequence with the way to this token; `ends`: sequences that end with it."""

    position: int
    slot: int
    ends: list[int]


class Branches:
    """The tree on top of the sequence `slot`."""

    def __init__(self, pool: Pool, slot: int) -> None:
        self.pool, self.slot, self.start = pool, slot, pool.lengths[slot]
        self.nodes = {ROOT: Node(self.start - 1, slot, [slot])}
        self.branches: list[int] = []

    def needed(self, block: Sequence[Drafted]) -> int:
        """How many more sequences the tree takes with these tokens."""
        leaves, on_top = leaves_of(block), Counter[int]()
        for token in block:
            if token.parent in self.nodes:
                on_top[token.parent] += leaves[token.column]
        return sum(max(0, count - len(self.nodes[column].ends)) for column, count in on_top.items())

    def add(self, block: Sequence[Drafted]) -> list[Entry]:
        """What to feed for these tokens, parents before their children."""
        leaves, entries = leaves_of(block), []
        for column, token, parent in block:
            slots = self._slots(self.nodes[parent], leaves[column])
            node = self.nodes[column] = Node(self.nodes[parent].position + 1, slots[0], slots)
            entries.append(Entry(token, node.position, tuple(slots), True))
        self.pool.shared += len(block)
        return entries

    def _slots(self, node: Node, count: int) -> list[int]:
        """Sequences that go on from a token."""
        slots, node.ends = node.ends[:count], node.ends[count:]
        new = [self.pool.branch(node.slot, node.position + 1) for _ in range(count - len(slots))]
        self.branches += new
        return slots + new

    def close(self, kept: Sequence[int]) -> None:
        """The sequence goes on with the tokens of these columns, a way from the root; the others are gone."""
        stop = self.start + len(kept)
        slot = self.nodes[kept[-1] if kept else ROOT].slot
        if slot == self.slot:
            self.pool.cut(slot, stop)
        else:
            self.pool.adopt(self.slot, slot, stop)
        self.pool.drop(self.branches)
        self.pool.lengths[self.slot] = stop
        self.pool.shared -= len(self.nodes) - 1


def leaves_of(block: Sequence[Drafted]) -> Counter[int]:
    """{column: leaves of this block on top of it, 1 for a leaf}."""
    leaves = Counter[int]()
    for column, _, parent in reversed(block):  # children come after their parents
        leaves[column] = leaves[column] or 1
        leaves[parent] += leaves[column]
    return leaves
