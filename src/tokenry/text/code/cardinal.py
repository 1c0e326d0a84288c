"""Cardinal points: the places of a program at which an editor would offer a completion, found from a corpus."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

from ...core.errors import InputError
from .lexer import NUMBER, STRING
from .views import CodeViews

__all__ = ["cardinal_points"]

# behind these a new name follows, which nobody can know
DECLARING = set("def class import from as function const let var".split())
COMPLETE = {"None", "True", "False", "null", "true", "false", "this", "super", ")", "]", "}"}  # what follows: no place
OPERANDS = {STRING, NUMBER, "(", "[", "{", "-", "~", "not", "lambda", "await", "None", "True", "False"}
OPERANDS |= {"!", "new", "this", "super", "function", "async", "typeof", "null", "true", "false", "undefined"}
LEAST = 0.01  # share of the followers that begin an operand


def cardinal_points(corpus: Iterable[CodeViews], max_share: float = 0.95) -> frozenset[str]:
    """The punctuation and keywords behind which an editor would complete.

    Left out is what nearly always has the same follower, what declares a new name, and what no operand follows
    ("True", a closing bracket): there is nothing to complete.

    Args:
        max_share: of the most frequent follower.

    Raises:
        InputError: a share outside (0, 1], or a corpus without such a point.
    """
    if not 0 < max_share <= 1:
        raise InputError(f"max_share={max_share} is not allowed; give a number in (0, 1]")
    followers: dict[str, Counter[str]] = defaultdict(Counter)
    operands: Counter[str] = Counter()
    for views in corpus:
        for value, kind, after, after_kind in zip(views.values, views.types, views.values[1:], views.types[1:]):
            if (kind == "OP" or kind == value.upper()) and value not in COMPLETE | DECLARING:
                followers[value][after] += 1
                operands[value] += after in OPERANDS or _is_name(after_kind)
    found = frozenset(
        value
        for value, counts in followers.items()
        if max(counts.values()) <= max_share * counts.total() and operands[value] >= LEAST * counts.total()
    )
    if not found:
        raise InputError("the corpus has no cardinal point; give more programs, or a higher max_share")
    return found


def _is_name(kind: str) -> bool:
    return "_" in kind or kind in ("MODULE", "LIBRARY", "LIB", "ALIAS")
