"""Numbers, declared once with their bounds: the fields of methods, the options of the command line, and what functions
take all read the same declaration.

Every number that leads to memory, to a loop or to a random generator has a ceiling. It lies far above what anybody
uses and below what would abort the process, run for ever, or turn float32 scores into infinities.
"""

from __future__ import annotations

import math
import numbers
import operator
import re
from typing import Annotated, Any, get_args

from annotated_types import Ge, Gt, Le, Lt

from .errors import InputError

__all__ = ["allowed", "check", "fits", "is_unicode", "read_ids", "read_none", "require", "shown"]

Seed = Annotated[int, Ge(0), Le(2**32 - 1)]  # what the generators of Python, numpy and torch all take
TorchSeed = Annotated[int, Ge(0), Le(2**63 - 1)]  # of torch alone: numbers are derived from seeds
Tokens = Annotated[int, Ge(1), Le(2**20)]  # of a text: the widest windows of models
TokenId = Annotated[int, Ge(0), Le(2**31 - 1)]
Entries = Annotated[int, Ge(1), Le(2**20)]  # of a vocabulary
Block = Annotated[int, Ge(1), Le(4096)]  # tokens that are filled or checked together; masks are its square
Chunk = Annotated[int, Ge(1), Le(1024)]  # tokens that another server is asked for at a time
Drafts = Annotated[int, Ge(1), Le(256)]
Layers = Annotated[int, Ge(1), Le(1024)]
Layer = Annotated[int, Ge(0), Le(1023)]
Width = Annotated[int, Ge(1), Le(2**16)]  # of a layer that is made anew
Batch = Annotated[int, Ge(1), Le(2**16)]
Count = Annotated[int, Ge(1), Le(10**6)]
Times = Annotated[int, Ge(0), Le(10**6)]  # a count that may be 0

Probability = Annotated[float, Ge(0), Le(1)]
Share = Annotated[float, Ge(0), Lt(1)]  # of which something must be left
Portion = Annotated[float, Gt(0), Le(1)]
Temperature = Annotated[float, Ge(1e-4), Le(10_000)]  # float32 logits divided by it stay finite
Logits = Annotated[float, Ge(0), Le(10_000)]  # added to or taken off them; float16 ends at 65,504
Weight = Annotated[float, Ge(0), Le(10_000)]  # of a term in a sum
Positive = Annotated[float, Gt(0), Le(10_000)]
Multiple = Annotated[float, Ge(1), Le(10_000)]
Rate = Annotated[float, Gt(0), Le(10)]  # of learning
Passes = Annotated[float, Gt(0), Le(10**6)]  # over data

HOLDS = {Ge: operator.ge, Gt: operator.gt, Le: operator.le, Lt: operator.lt}


def fits(value: Any, declared: Any) -> bool:
    """Whether a value is a number within the bounds of an `Annotated` int or float. NaN lies within none."""
    kind, *bounds = get_args(declared)
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if kind is int else numbers.Real):
        return False
    return all(HOLDS[type(bound)](value, _limit(bound)) for bound in bounds)


def allowed(declared: Any) -> str:
    """The bounds in words, for example "a whole number in [0, 4294967295]"."""
    kind, low, high = get_args(declared)
    left, right = "(" if isinstance(low, Gt) else "[", ")" if isinstance(high, Lt) else "]"
    return f"a {'whole ' if kind is int else ''}number in {left}{_limit(low):.10g}, {_limit(high):.10g}{right}"


def check(name: str, value: Any, declared: Any) -> None:
    """Refuse an argument that is no number within its bounds.

    Raises:
        InputError: it is not.
    """
    if not fits(value, declared):
        raise InputError(f"{name}={shown(value)} is not allowed; give {allowed(declared)}")


def require(holds: Any, name: str, value: Any, allowed: str) -> None:
    """Refuse unless `holds` everywhere (a bool, array or tensor, as the value is) and the value is finite.

    Raises:
        InputError: it does not.
    """
    good = holds & (abs(value) < math.inf)
    if not (good if isinstance(good, bool) else good.all()):
        raise InputError(f"{name}={value} is not allowed; give {allowed}")


def read_none(value: Any) -> Any:
    """None from the command line: 'none'. Other values pass."""
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


def read_ids(value: Any) -> Any:
    """Whole numbers from the command line, '12,34', or 'none'. Other values pass."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", value):
        return tuple(int(part) for part in value.split(","))
    return read_none(value)


def shown(value: Any, most: int = 60) -> str:
    """A value as a refusal shows it: quoted, on one line, and cut where it is long."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= most else text[: most - 3] + "..."


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: it has no lone surrogates, as bytes that are no UTF-8 leave behind."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _limit(bound: Ge | Gt | Le | Lt) -> Any:
    return getattr(bound, type(bound).__name__.lower())
