"""A hash tree of leaves in order, with proofs that a leaf is at its place, as in RFC 6962 (section 2.1).

Leaves and inner nodes are hashed with different first bytes, so that no node passes for a leaf. n leaves are split at
the largest power of two below n and no leaf is ever repeated: where an odd level is padded with its last node, a tree
of n leaves has the root of one of n + 1 whose last two are equal, which is fatal where the number of leaves is billed.
The commitment binds that number beside the root.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from ...core.errors import InputError

__all__ = ["MerkleTree", "commit", "hash_of", "verify_proof"]

HashName = Literal["sha256", "blake2b"]
HASHES: dict[str, Callable[[bytes], Any]] = {
    "sha256": hashlib.sha256,
    "blake2b": partial(hashlib.blake2b, digest_size=32),
}
LEAF, NODE, COUNT = b"\0", b"\1", b"\2"  # what a hash is of


def hash_of(name: str) -> Callable[[bytes], bytes]:
    """bytes -> 32 bytes.

    Raises:
        InputError: a hash that is not known.
    """
    if name not in HASHES:
        raise InputError(f"the hash {name!r} is not known; give one of {', '.join(HASHES)}")
    return lambda data: HASHES[name](data).digest()


def commit(root: bytes, n: int, hash: str = "sha256") -> bytes:
    """The root of n leaves with their number, 8 bytes, the highest first."""
    return hash_of(hash)(COUNT + n.to_bytes(8, "big") + root)


class MerkleTree:
    """The tree over `leaves`, in their order.

    tree = MerkleTree([b"a", b"b", b"c"])
    verify_proof(b"b", 1, 3, tree.proof(1), tree.commitment)

    Raises:
        InputError: no leaf.
    """

    def __init__(self, leaves: Sequence[bytes], hash: str = "sha256") -> None:
        if not leaves:
            raise InputError("a hash tree needs at least 1 leaf, not 0; commit to something")
        self.hash, digest = hash, hash_of(hash)
        self.levels = [[digest(LEAF + leaf) for leaf in leaves]]
        while len(below := self.levels[-1]) > 1:
            above = [digest(NODE + left + right) for left, right in zip(below[::2], below[1::2])]
            self.levels.append(above + below[len(above) * 2 :])  # a node without a neighbor rises as it is

    def __len__(self) -> int:
        return len(self.levels[0])

    @property
    def root(self) -> bytes:
        """The Merkle tree hash of RFC 6962."""
        return self.levels[-1][0]

    @property
    def commitment(self) -> bytes:
        """The root and the number of leaves."""
        return commit(self.root, len(self), self.hash)

    def proof(self, i: int) -> list[bytes]:
        """The neighbors on the way from leaf i to the root, the lowest first.

        Raises:
            InputError: there is no such leaf.
        """
        if not 0 <= i < len(self):
            raise InputError(f"leaf {i} is not in a tree of {len(self)}; give 0 to {len(self) - 1}")
        path = []
        for level in self.levels[:-1]:
            if i ^ 1 < len(level):
                path.append(level[i ^ 1])
            i //= 2
        return path


def verify_proof(leaf: bytes, i: int, n: int, proof: Sequence[bytes], commitment: bytes, hash: str = "sha256") -> bool:
    """Whether `leaf` is number i of the n leaves that were committed to. Which neighbor stands on which side follows
    from i and n, and is never taken from the proof."""
    if not 0 <= i < n:
        return False
    digest, left = hash_of(hash), list(proof)
    node, width = digest(LEAF + leaf), n
    while width > 1:
        if i ^ 1 < width:
            if not left:
                return False
            neighbor = left.pop(0)
            node = digest(NODE + (neighbor + node if i % 2 else node + neighbor))
        i, width = i // 2, (width + 1) // 2
    return not left and hmac.compare_digest(commit(node, n, hash), commitment)
