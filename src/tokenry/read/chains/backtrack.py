"""Walk back along attention, from the tokens of an answer to those that it rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Walk", "backtrack", "is_stop"]

STEPS = 1000
BEST_KEYS = 5  # of a row that count, once enough was found
WORDS = """a about above after again against all am an and any are as at be because been before being below between both
but by cannot could did do does doing down during each few for from further had has have having he her here hers herself
him himself his how i if in into is it its itself me more most my myself no nor not of off on once only or other ought
our ours ourselves out over own same she should so some such than that the their theirs them themselves then there these
they this those through to too under until up very was we were what when where which while who whom why with would you
your yours yourself yourselves also"""
CONTRACTED = """i’m you’re he’s she’s it’s we’re they’re i’ve you’ve we’ve they’ve i’d you’d he’d she’d we’d they’d i’ll
you’ll he’ll she’ll we’ll they’ll isn’t aren’t wasn’t weren’t hasn’t haven’t hadn’t doesn’t don’t didn’t won’t wouldn’t
shan’t shouldn’t can’t couldn’t mustn’t let’s that’s who’s what’s here’s there’s when’s where’s why’s how’s"""
STOP = {"", *WORDS.split(), *CONTRACTED.split(), *".,!?;:'\"‘’“”()[]{}_…\\@~`"}


def is_stop(piece: str) -> bool:
    """Whether a token is a function word, a punctuation character or nothing."""
    return "".join(piece.split()).lower() in STOP


class Walk(NamedTuple):
    """How the walk goes: new tokens of a step, the least attention of one, and how many there shall be in any case."""

    buffer: int
    threshold: float
    least: int


def backtrack(rows: Tensor, sources: Sequence[int], stop: Sequence[bool], walk: Walk) -> dict[int, float]:
    """Sources of the chain with their scores, those of the answer first, with 0.

    A source is the token before the one that counts: where that one was predicted.

    Args:
        rows: (T, T) attention; all zero for tokens that the walk ends at.
        stop: of each token whether it never counts.
    """
    chain, frontier, used = dict.fromkeys(sources, 0.0), list(sources), set()
    enough = walk.least + len(sources)
    for _ in range(STEPS):
        used |= {*frontier}
        score = _scores(rows, frontier, used, stop, len(chain) >= enough)
        new = []
        for key in score.argsort(descending=True, stable=True).tolist():
            late = score[key] < walk.threshold and len(chain) + len(new) >= enough
            if score[key] <= 0 or late or len(new) >= walk.buffer:
                break
            chain[key - 1] = float(score[key])
            new.append(key - 1)
        frontier = new
        if not frontier:
            break
    return chain


def _scores(rows: Tensor, frontier: Sequence[int], used: set[int], stop: Sequence[bool], enough: bool) -> Tensor:
    """(T,) attention that the frontier pays to each token which may come next."""
    score, found = torch.zeros(rows.shape[1]), enough
    for source in frontier:
        for rank, key in enumerate(rows[source].argsort(descending=True, stable=True).tolist()):
            value = rows[source, key]
            if value <= 0 or (rank >= BEST_KEYS and found):
                break
            if key != source and key - 1 not in used and not stop[key]:
                score[key] += value
                found = True
    return score
