"""Order of completions: names that were declared nearby go first.

Paper: CodeFill, arXiv 2202.06689, whose table of weights this is; the authors' notebook has another one and throws the
result away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import get_args

from ...core.errors import InputError
from ...text.code.scopes import SCOPES, NameKind, Scope

__all__ = ["WEIGHTS", "Candidate", "Ranked", "Weights", "mrr_at_k", "rerank", "weights_of"]

Weights = Mapping[NameKind, Mapping[Scope, float]]
KINDS: tuple[NameKind, ...] = get_args(NameKind)


def weights_of(numbers: Sequence[float]) -> Weights:
    """A table from nine numbers: attributes, variables and functions, each in function, class and file.

    Raises:
        InputError: other than nine, or one that is not above 0.
    """
    if len(numbers) != len(KINDS) * len(SCOPES) or not all(0 < n < math.inf for n in numbers):
        raise InputError(
            f"rerank_weights={','.join(f'{n:g}' for n in numbers)} is not allowed; give nine numbers above 0: "
            f"{', '.join(f'{kind}s' for kind in KINDS)}, each in {', '.join(SCOPES)}"
        )
    rows = (dict(zip(SCOPES, numbers[i : i + len(SCOPES)])) for i in range(0, len(numbers), len(SCOPES)))
    return MappingProxyType(dict(zip(KINDS, rows)))


PUBLISHED = (1.625, 1.25, 1.125, 1.625, 1.125, 1.5, 1.125, 1.625, 1.5)
WEIGHTS = weights_of(PUBLISHED)


@dataclass(frozen=True)
class Candidate:
    """What may stand at a place. `kind`: attribute, variable or function; another word for what is no name."""

    value: str
    probability: float
    kind: str


@dataclass(frozen=True)
class Ranked:
    """A candidate in its place. `score` may exceed 1; `scope` is where the name is visible from, if it is."""

    candidate: Candidate
    score: float
    scope: Scope | None


def rerank(
    candidates: Iterable[Candidate],
    scope: Callable[[str], Scope | None] | Mapping[str, Scope],
    weights: Weights = WEIGHTS,
    top_k: int = 10,
) -> list[Ranked]:
    """The `top_k` most probable candidates; what is visible counts `weights[kind][scope]` times as much. Equal scores
    stay in their order.

    Args:
        scope: from where each name is visible, see `VisibleNames.scope`.

    Raises:
        InputError: a candidate without a kind.
    """
    look = scope.get if isinstance(scope, Mapping) else scope
    best = sorted(candidates, key=lambda one: -one.probability)[:top_k]
    ranked = []
    for one in best:
        if not one.kind:
            raise InputError(f"the candidate {one.value!r} has no kind; give {', '.join(KINDS)}, or what else it is")
        where = look(one.value) if one.kind in weights else None
        weight = weights[one.kind][where] if where else 1.0  # pyright: ignore[reportArgumentType]  # it is in there
        ranked.append(Ranked(one, one.probability * weight, where))
    return sorted(ranked, key=lambda one: -one.score)


def mrr_at_k(ranks: Sequence[int | None], k: int = 10) -> float:
    """Mean of 1 / rank, where ranks count from 1; what is beyond k or nowhere (None) counts 0.

    Raises:
        InputError: no ranks, or one below 1.
    """
    if not ranks or any(rank is not None and rank < 1 for rank in ranks):
        raise InputError("mrr_at_k needs ranks that count from 1; give at least one, and None for what is not there")
    return sum(1 / rank for rank in ranks if rank is not None and rank <= k) / len(ranks)
