"""A score along the tokens of a trace: where the thinking lies, how high it was there, and how far it fell."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...core.errors import InputError
from ...trace.trace import Trace
from .examples import MARKERS

__all__ = ["Cliff", "Place", "Plateau", "cliff_score", "place_of"]

Plateau = Literal["mean_think", "max", "last_k"]
LAST = 10  # tokens of thinking that `last_k` averages


class Place(NamedTuple):
    """Tokens of the thinking, half-open and without its markers, and the first token of the answer."""

    think: tuple[int, int]
    end: int


class Cliff(NamedTuple):
    """The score on the plateau, right before the answer, and the difference; the first token after which it stays below
    half of the plateau, None where there is none."""

    plateau: float
    final: float
    cliff: float
    falls_at: int | None


def place_of(trace: Trace) -> Place:
    """Where a trace thinks and where its answer begins: behind the closing marker and the white space after it.

    Raises:
        InputError: a trace without text, a marker that is not there, no thinking between them.
    """
    if not trace.text:
        raise InputError("the trace has no text, in which thinking could be found; capture again with tokenizer=...")
    opening, closing = MARKERS
    begin = trace.text.find(opening)
    close = trace.text.find(closing, max(begin, 0))
    if begin < 0 or close < 0:
        raise InputError(
            f"there is no thinking between {opening!r} and {closing!r} in the text; give a text or trace with both"
        )
    behind = close + len(closing)
    while behind < len(trace.text) and trace.text[behind].isspace():
        behind += 1
    starts, ends = (column.contiguous() for column in trace.offsets.T)
    first = int(torch.searchsorted(starts, begin + len(opening)))
    # The first tokens that reach into the marker and into the answer: a token may bring the space before it.
    last, end = torch.searchsorted(ends, torch.tensor([close, behind]), right=True).tolist()
    if first >= last or not trace.text[begin + len(opening) : close].strip():
        raise InputError(f"the thinking between {opening!r} and {closing!r} is empty; give a trace that thinks")
    return Place((first, last), end)


def cliff_score(
    curve: Tensor, think_span: tuple[int, int], end: int, plateau: Plateau = "mean_think", last_k: int = LAST
) -> Cliff:
    """Plateau minus final score.

    Args:
        curve: (T,) scores in [0, 1].
        think_span: tokens of the thinking, half-open; `end`: the first token of the answer, see `place_of`.
        plateau: the mean over the thinking, its highest score, or the mean of its last `last_k` tokens.

    Raises:
        InputError: an empty span, one that is not within the curve, another plateau.
    """
    start, stop = think_span
    if not 0 <= start < stop <= end <= len(curve):
        raise InputError(
            f"thinking at tokens {start} to {stop} and an answer from {end} are not allowed; give "
            f"0 <= start < stop <= end <= {len(curve)}"
        )
    if plateau not in ("mean_think", "max", "last_k") or last_k < 1:
        raise InputError(f"plateau={plateau!r}, last_k={last_k} is not allowed; give mean_think, max, or last_k >= 1")
    thought = curve[start:stop].float()
    high = thought.max() if plateau == "max" else thought[-last_k if plateau == "last_k" else 0 :].mean()
    final = float(curve[end - 1])
    above = (curve[start:end] >= high / 2).nonzero().squeeze(1)
    falls_at = start + int(above[-1]) + 1 if len(above) else start
    return Cliff(float(high), final, float(high) - final, falls_at if falls_at < end else None)
