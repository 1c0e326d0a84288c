"""Draft trees: what was drafted after a row, and the distributions it was drawn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ROOT", "DraftTree", "slots"]

ROOT = -1  # the row's last token


class DraftTree:
    """Drafted continuations of one row; nodes are numbered from 0, parents before their children.

    Drafts that begin alike share their nodes, so that the target sees each of them once.

    Attributes:
        tokens, parents: of each node; the parent of the first ones is ROOT.
        drafts: {node: its drafted children in the order in which they were drawn}; one drawn twice is there twice.
        distributions: {node: probabilities (vocabulary,) that its children were drawn from}.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.drafts: dict[int, list[int]] = {}
        self.distributions: dict[int, Tensor] = {}
        self.weights: dict[int, float] = {ROOT: 1.0}  # probability of the path to a node under the draft distribution

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, tokens: Sequence[int], distribution: Tensor) -> list[int]:
        """Note what was drawn after `parent`; returns the new nodes."""
        nodes: dict[int, int] = {}
        for token in tokens:
            if token not in nodes:
                nodes[token] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(parent)
        chances = distribution[list(nodes)].tolist()
        self.weights.update({node: self.weights[parent] * p for node, p in zip(nodes.values(), chances)})
        self.drafts[parent] = [nodes[token] for token in tokens]
        self.distributions[parent] = distribution
        return list(nodes.values())

    def drafted(self, node: int) -> list[int]:
        """The tokens drafted after `node`, in order."""
        return [self.tokens[child] for child in self.drafts.get(node, ())]

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` with this token."""
        return next((child for child in self.drafts.get(node, ()) if self.tokens[child] == token), None)

    def copies(self, node: int) -> int:
        """How many of the drafts go through `node`."""
        return self.drafts[self.parents[node]].count(node)

    def path(self, node: int) -> list[int]:
        """The tokens from the root to `node`."""
        found: list[int] = []
        while node != ROOT:
            found.append(self.tokens[node])
            node = self.parents[node]
        return found[::-1]


def slots(weights: Sequence[float], distributions: Tensor, count: int) -> list[int]:
    """How many distinct drafts each of several nodes gets, `count` in all at most.

    The j-th draft of a node is worth the chance that the text gets there and that none of j - 1 better tokens follows;
    the most valuable drafts are taken. The numbers do not depend on what is drawn later, as losslessness needs it.

    Args:
        weights: the probability of each node under the draft distribution.
        distributions: (nodes, vocabulary), what follows each node.
    """
    best = distributions.topk(min(count, distributions.shape[1])).values
    left = 1 - best.cumsum(-1) + best
    value = torch.where(best > 0, torch.tensor(weights, device=distributions.device)[:, None] * left, -1.0)
    chosen = value.flatten().topk(min(count, value.numel()))
    nodes = (chosen.indices // best.shape[1])[chosen.values >= 0]
    return torch.bincount(nodes, minlength=len(weights)).tolist()
