"""Where the final answer of a solution stands, which tokens it is made of, and when two answers are the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from torch import Tensor

from ..core.errors import InputError
from .spans import Span

__all__ = ["MARKERS", "Marker", "answer_tokens", "check_marker", "find_answer", "normalise_answer"]

Marker = str | Callable[[str], Span | None]

BOXED = re.compile(r"\\boxed\s*\{")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is text
LEAD = re.compile(r"\bA:|\b[Tt]he (?:final )?answer is:?|####")
REST = re.compile(r"[^\S\n]*(\S.*?)(?=\s*(?:\.(?:\s|\Z)|\n|<\||</s>|\Z))")  # to the end of the sentence or line
NUMBER = re.compile(r"((?:(?<!\w)-)?(?:\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)(?:/\d+)?)")


def find_answer(text: str, marker: Marker = "boxed", finished: bool = True) -> Span | None:
    """Half-open character span of the final answer in `text`, without the white space around it.

    Args:
        marker: "boxed", the inner text of the last \\boxed{...}; "answer", what follows the last "A:", "The answer is"
            or "####" up to the end of the sentence or line; "number", the last number; a regex with one group, whose
            last match counts; or a function from text to span.
        finished: False if the text was cut off, for example by a limit on tokens. An answer that the missing text could
            go on with is then no answer.

    Returns:
        None if there is no marker, nothing in it, or only part of it.
    """
    found = _finder(marker)(text)
    if found is None:
        return None
    start, end = found
    inner = text[start:end]
    start, end = start + len(inner) - len(inner.lstrip()), end - len(inner) + len(inner.rstrip())
    cut = not finished and not text[end:].strip(" .,")
    return None if start >= end or cut else (start, end)


def check_marker(marker: Marker) -> Marker:
    """The marker, if it is one.

    Raises:
        InputError: a text that is neither a name nor a regex with one group.
    """
    if isinstance(marker, str) and marker not in MARKERS:
        hint = f"give {', '.join(MARKERS)}, or a regex with one group around the answer"
        try:
            groups = re.compile(marker).groups
        except re.error as error:
            raise InputError(f"the marker {marker!r} is no regex ({error}); {hint}") from None
        if groups != 1:
            raise InputError(f"the marker {marker!r} has {groups} groups; {hint}")
    return marker


def _finder(marker: Marker) -> Callable[[str], Span | None]:
    if callable(marker):
        return marker
    return MARKERS.get(marker) or (lambda text: _last(re.compile(marker), text))


def _last(pattern: re.Pattern, text: str) -> Span | None:
    *_, last = [None, *pattern.finditer(text)]
    return None if last is None else last.span(1)


def _boxed(text: str) -> Span | None:
    *_, opened = [None, *BOXED.finditer(text)]
    depth = 1
    for brace in BRACE.finditer(text, opened.end()) if opened else ():
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return opened.end(), brace.start()
    return None


def _after_lead(text: str) -> Span | None:
    *_, lead = [None, *LEAD.finditer(text)]
    rest = REST.match(text, lead.end()) if lead else None
    return None if rest is None else rest.span(1)


MARKERS: dict[str, Callable[[str], Span | None]] = {
    "boxed": _boxed,
    "answer": _after_lead,
    "number": lambda text: _last(NUMBER, text),
}


def answer_tokens(text: str, offsets: Tensor | Sequence[Span], span: Span) -> list[int]:
    """The tokens that overlap `span`, also those with a character beside it; tokens of nothing but braces are left out.

    Args:
        offsets: characters of `text` that each token stands for, (T, 2).
    """
    pairs = offsets.tolist() if isinstance(offsets, Tensor) else offsets
    inside = [(i, text[a:b]) for i, (a, b) in enumerate(pairs) if a < span[1] and b > span[0]]
    return [i for i, piece in inside if piece.strip("{}")]


def normalise_answer(text: str) -> str:
    """One spelling for answers that mean the same: "$1,234.50$." is "1234.5", "\\dfrac{1}{2}" is "1/2".

    Spaces, dollar signs, \\text{}, dots at the end and capitals do not count. Nothing is calculated: 1/2 is not 0.5.
    """
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:left|right)\b|\\[!,;: ]|\\?\$|\s", "", text).rstrip(".")
    text = re.sub(r"\\[dt]?frac(?:\{([^{}]*)\}\{([^{}]*)\}|(\d)(\d))", _fraction, text)
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?", text):
        text = text.replace(",", "")
    number = re.fullmatch(r"([+-]?)([0-9]*)\.?([0-9]*)", text)
    if number is None or not number[2] + number[3]:
        return text.casefold()
    whole, part = number[2].lstrip("0") or "0", number[3].rstrip("0")
    value = f"{whole}.{part}" if part else whole
    return "-" + value if number[1] == "-" and value != "0" else value


def _fraction(match: re.Match) -> str:
    parts = [part for part in match.groups() if part is not None]
    return "/".join(part if part.isalnum() else f"({part})" for part in parts)
