"""Errors as optical character recognition makes them."""

from __future__ import annotations

import random

from ...core.errors import InputError

__all__ = ["ocr_errors"]

# Shapes that scanners take for each other, in both directions.
ALIKE = "e/c o/0 l/1 S/5 h/b n/u U/V B/8 g/q t/f a/o z/2 i/l I/l ./, rn/m cl/d vv/w".split()
SWAPS: dict[str, list[str]] = {}
for _one, _other in (pair.split("/") for pair in ALIKE):
    SWAPS.setdefault(_one, []).append(_other)
    SWAPS.setdefault(_other, []).append(_one)
SPLIT, JOIN = 0.15, 0.3  # shares of errors: a space put in, and a space lost where there is one


def ocr_errors(text: str, rate: float = 0.05, seed: int | str = 0) -> str:
    """`text` with recognition errors: confused shapes ("5enate"), split words ("S tates"), joined words.

    Args:
        rate: probability of an error at a character that allows one, in [0, 1].
        seed: the same seed gives the same errors.

    Raises:
        InputError: rate out of range.
    """
    if not 0 <= rate <= 1:
        raise InputError(f"rate={rate} is not a probability; give a number in [0, 1]")
    draw, out, at = random.Random(seed), [], 0
    while at < len(text):
        length = 2 if text[at : at + 2] in SWAPS else 1
        piece = text[at : at + length]
        out.append(_misread(piece, draw) if draw.random() < rate else piece)
        at += length
    return "".join(out)


def _misread(piece: str, draw: random.Random) -> str:
    kind = draw.random()
    if piece == " ":
        return "" if kind < JOIN else piece
    if piece.isalpha() and kind < SPLIT:
        return piece + " "
    return draw.choice(SWAPS[piece]) if piece in SWAPS else piece
