"""Drafters: what may come next, cheaply. A drafter scores continuations; the tree grows from its scores elsewhere.

The loop turns scores into the distribution that drafts are drawn from, with the same processors and warpers as for the
target. Nothing else may be done to them: a verifier is lossless for the distribution that was really drawn from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...hooks.layers import skip_layers
from ...models.anatomy import decoder_layers
from ...models.batch import left_padded, shared_length
from ...models.load import shared
from ...models.positions import fixed_positions
from ..engines.choice import open_engine
from .tree import ROOT, DraftTree

__all__ = [
    "CachedDrafter",
    "Drafter",
    "EarlyExitDrafter",
    "ModelDrafter",
    "NGramDrafter",
    "PromptLookupDrafter",
    "check_same_tokens",
    "make_drafter",
]

MOST_SHARED = 0.98  # share of ids that two paddings of one vocabulary have in common at least

Context = list[int] | None


@runtime_checkable
class Drafter(Protocol):
    """Scores next tokens, one level of the tree at a time, for all rows of a batch at once.

    A row of scores (vocabulary,) holds logits or log-probabilities in float32; -inf everywhere: no draft here.
    """

    def begin(self, target: PreTrainedModel, rows: int, distinct: bool) -> None:
        """A new generation. `distinct`: several different drafts of a token are of use."""

    def root(self, contexts: Sequence[Context]) -> Tensor:
        """Scores (rows, vocabulary) after the ids of each row; a row that is None is left out and its scores unused."""
        ...

    def extend(self, trees: Sequence[DraftTree], nodes: Sequence[Sequence[int]]) -> Sequence[Tensor]:
        """Scores (len(nodes[r]), vocabulary) after the newest nodes of each row's tree."""
        ...


@runtime_checkable
class CachedDrafter(Drafter, Protocol):
    """A drafter that keeps something of every row. `positions`: how many tokens it can read; None is no limit."""

    positions: int | None

    def free(self, row: int) -> None:
        """The row is over: give back what is held for it."""


# --- from the text so far ------------------------------------------------------------------------------------------


class _ContextDrafter(ABC):
    """Scores that are a function of the text so far alone."""

    @abstractmethod
    def distribution(self, ids: np.ndarray) -> np.ndarray | None:
        """Probabilities (vocabulary,) after `ids` (length,); None: no draft."""

    def begin(self, target: PreTrainedModel, rows: int, distinct: bool) -> None:
        self.vocabulary = target.config.get_text_config().vocab_size
        self.device, self.distinct = target.device, distinct

    def root(self, contexts: Sequence[Context]) -> Tensor:
        self.contexts = contexts
        return torch.stack([self._scores([]) if ids is None else self._scores(ids) for ids in contexts])

    def extend(self, trees: Sequence[DraftTree], nodes: Sequence[Sequence[int]]) -> list[Tensor]:
        return [
            torch.stack([self._scores([*(ids or ()), *tree.path(node)]) for node in new]) if new else torch.empty(0)
            for ids, tree, new in zip(self.contexts, trees, nodes)
        ]

    def _scores(self, ids: list[int]) -> Tensor:
        found = self.distribution(np.array(ids)) if ids else None
        if found is None:
            return torch.full((self.vocabulary,), -torch.inf, device=self.device)
        return torch.from_numpy(found).to(self.device, torch.float32).log()


def matches(ids: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Places where what the text ends with was before: (the positions after it, latest first; how many tokens agree).

    `longest` bounds the second; places where nothing agrees are left out.
    """
    length = len(ids)
    places = np.flatnonzero(ids[:-1] == ids[-1])[::-1] + 1
    agree = np.ones(len(places), dtype=int)
    going = np.arange(len(places))
    for back in range(2, longest + 1):
        going = going[places[going] >= back]
        going = going[ids[places[going] - back] == ids[length - back]] if back <= length else going[:0]
        if not len(going):
            break
        agree[going] = back
    return places, agree


class PromptLookupDrafter(_ContextDrafter):
    """What followed the last tokens where they stood before. Costs nothing; of use where the text repeats its prompt.

    One draft is the continuation of the longest agreement, the latest of equal ones, with probability 1. Where several
    different ones are of use, the r-th best of them has a weight of 2^-r.

    Args:
        longest: the most tokens that are compared; `shortest`: fewer than these are no agreement.
    """

    def __init__(self, longest: int = 16, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise InputError(f"shortest={shortest}, longest={longest} are not allowed; give 1 <= shortest <= longest")
        self.longest, self.shortest = longest, shortest

    def distribution(self, ids: np.ndarray) -> np.ndarray | None:
        places, agree = matches(ids, self.longest)
        places, agree = places[agree >= self.shortest], agree[agree >= self.shortest]
        if not len(places):
            return None
        best = dict.fromkeys(ids[places[np.argsort(-agree, kind="stable")]].tolist())
        tokens = list(best) if self.distinct else list(best)[:1]
        weights = 0.5 ** np.arange(len(tokens))
        found = np.zeros(self.vocabulary)
        found[tokens] = weights / weights.sum()
        return found


class NGramDrafter(_ContextDrafter):
    """An n-gram model of the text so far, smoothed by interpolation (Witten-Bell).

    p(w | last n) = (c(last n, w) + d p(w | last n - 1)) / (c(last n) + d), where d counts the different followers. The
    last resort is uniform over the vocabulary, with the weight that the text gives to tokens it has never seen.

    Args:
        order: the longest context in tokens.
    """

    def __init__(self, order: int = 3) -> None:
        if order < 1:
            raise InputError(f"order={order} is not allowed; give a number of tokens >= 1")
        self.order = order

    def distribution(self, ids: np.ndarray) -> np.ndarray:
        places, agree = matches(ids, self.order)
        found = self._mixed(np.full(self.vocabulary, 1 / self.vocabulary), ids)
        for n in range(1, self.order + 1):
            followers = ids[places[agree >= n]]
            if not len(followers):
                break
            found = self._mixed(found, followers)
        return found

    def _mixed(self, below: np.ndarray, followers: np.ndarray) -> np.ndarray:
        tokens, counts = np.unique(followers, return_counts=True)
        found = below * (len(tokens) / (len(followers) + len(tokens)))
        found[tokens] += counts / (len(followers) + len(tokens))
        return found


# --- from a model --------------------------------------------------------------------------------------------------


class ModelDrafter:
    """A smaller model with the same vocabulary and a cache of its own, which follows what the target accepts.

    Its logits may be padded to another width than the target's: drafts are tokens that both have.
    """

    positions: int | None = None

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def begin(self, target: PreTrainedModel, rows: int, distinct: bool) -> None:
        mine, wanted = (m.config.get_text_config().vocab_size for m in (self.model, target))
        if min(mine, wanted) < MOST_SHARED * max(mine, wanted):
            raise InputError(f"draft vocabulary {mine} != target {wanted}; the ids must mean the same tokens")
        self.known, self.vocabulary = mine, wanted
        self.positions = fixed_positions(self.model)
        self.engine = open_engine(self.model)
        self.engine.check_tree()
        if isinstance(self.engine.cache, Cache):  # the first block ends with a token that may be taken back
            self.engine.cache.activate_past_recording()
        self.fed: list[list[int]] = [[] for _ in range(rows)]
        self.columns: list[dict[int, int]] = []  # of each row's nodes that are in the cache
        self.trees: Sequence[DraftTree] = ()

    def root(self, contexts: Sequence[Context]) -> Tensor:
        self._follow(contexts)
        pending = [ids[len(fed) :] if ids else [] for ids, fed in zip(contexts, self.fed)]
        self.fed = [fed + new for fed, new in zip(self.fed, pending)]
        tokens, mask = left_padded(pending, self.model.device)
        return self._shared(self.engine.forward(self._read(tokens), None if bool(mask.all()) else mask))

    def extend(self, trees: Sequence[DraftTree], nodes: Sequence[Sequence[int]]) -> list[Tensor]:
        if not self.columns:
            self.trees, self.columns, self.open = trees, [{} for _ in trees], 0
        tokens, mask = left_padded(
            [[tree.tokens[n] for n in new] for tree, new in zip(trees, nodes)], self.model.device
        )
        width = tokens.shape[1]
        parents = np.full((len(trees), width), ROOT)
        for row, (tree, new) in enumerate(zip(trees, nodes)):
            place = self.columns[row]
            for i, node in enumerate(new, width - len(new)):
                parents[row, i] = place.get(tree.parents[node], ROOT)
            place.update({node: self.open + i for i, node in enumerate(new, width - len(new))})
        self.open += width
        logits = self._shared(self.engine.forward_tree(self._read(tokens), mask, parents))
        return [logits[row, width - len(new) :] for row, new in enumerate(nodes)]

    def free(self, row: int) -> None:
        if self.fed[row]:
            self.engine.free(row)

    def _read(self, tokens: Tensor) -> Tensor:
        """The tokens as this model has them; one that only the target has is read as the last one."""
        return tokens.clamp(max=self.known - 1)

    def _shared(self, logits: Tensor) -> Tensor:
        """Logits (..., target's vocabulary): what the target does not have is gone, what is missing not drafted."""
        return torch.nn.functional.pad(logits, (0, self.vocabulary - self.known), value=-torch.inf)

    def _follow(self, contexts: Sequence[Context]) -> None:
        """Bring the cache to the rows as they are now: keep the nodes they have gone along, take back what was rewound.
        The last token of a row is always left to be fed."""
        gone = [len(fed) - shared_length(fed, ids[:-1]) if ids else 0 for fed, ids in zip(self.fed, contexts)]
        if self.columns:
            self.engine.commit(
                [self._accepted(row, ids) if ids and not gone[row] else [] for row, ids in enumerate(contexts)]
            )
            self.columns = []
        for row, count in enumerate(gone):
            if count:
                self.engine.rollback(row, count)
                del self.fed[row][-count:]

    def _accepted(self, row: int, ids: list[int]) -> list[int]:
        """Columns of the nodes that the row has gone along; their tokens count as fed."""
        tree, node, kept = self.trees[row], ROOT, []
        for token in ids[len(self.fed[row]) : -1]:
            node = tree.child(node, token)
            if node not in self.columns[row]:
                break
            kept.append(self.columns[row][node])
            self.fed[row].append(token)
        return kept


class EarlyExitDrafter(ModelDrafter):
    """The first layers of the target, with its norm and head. Without training they say little about the last one.

    Args:
        layers: how many; None is two thirds.
    """

    def __init__(self, layers: int | None = None) -> None:
        self.layers = layers

    def begin(self, target: PreTrainedModel, rows: int, distinct: bool) -> None:
        depth = len(decoder_layers(target))
        count = max(1, depth * 2 // 3) if self.layers is None else self.layers
        if not 1 <= count <= depth:
            raise InputError(
                f"exit_layers={count} is not allowed; this model has {depth}, give a number from 1 to {depth}"
            )
        self.model, self.executed = target, range(count)
        super().begin(target, rows, distinct)

    def root(self, contexts: Sequence[Context]) -> Tensor:
        with skip_layers(self.model, self.executed):
            return super().root(contexts)

    def extend(self, trees: Sequence[DraftTree], nodes: Sequence[Sequence[int]]) -> list[Tensor]:
        with skip_layers(self.model, self.executed):
            return super().extend(trees, nodes)


# --- by name -------------------------------------------------------------------------------------------------------


def make_drafter(drafter: str | PreTrainedModel | Drafter, target: PreTrainedModel, layers: int | None) -> Drafter:
    """A drafter by its name, of a model, or as it is.

    Args:
        drafter: "prompt-lookup", "ngram", "early-exit", the name of a model for `tokenry.load`, a model, or a drafter.
        layers: of the early exit.
    """
    if layers is not None and drafter != "early-exit":
        raise InputError(f"exit_layers={layers} is of the drafter 'early-exit'; leave it out for {drafter!r}")
    if drafter == "prompt-lookup":
        return PromptLookupDrafter()
    if drafter == "ngram":
        return NGramDrafter()
    if drafter == "early-exit":
        return EarlyExitDrafter(layers)
    if isinstance(drafter, str):
        return ModelDrafter(shared(drafter, like=target).model)
    if isinstance(drafter, PreTrainedModel) or hasattr(drafter, "get_base_model"):  # or one of peft
        return ModelDrafter(cast(PreTrainedModel, drafter))
    if not isinstance(drafter, Drafter):
        raise InputError(
            f"{type(drafter).__name__} is no drafter: it has no scores to draw drafts from; give 'prompt-lookup', "
            "'ngram', 'early-exit', a model, or an object with begin, root and extend"
        )
    return drafter


def check_same_tokens(name: str, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a draft model by name whose ids mean other tokens than the target's."""
    other = shared(name, like=target).tokenizer.get_vocab()
    mine = tokenizer.get_vocab()
    if other != mine:
        token = next(t for t in [*other, *mine] if other.get(t) != mine.get(t))
        raise InputError(
            f"the token {token!r} is {other.get(token)} for {name} and {mine.get(token)} for the target; the ids must "
            "mean the same tokens"
        )
