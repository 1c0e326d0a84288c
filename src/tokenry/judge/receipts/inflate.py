"""Padded bills: what a provider may add to its reasoning. Made to fit and to test audits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from ...core.errors import InputError
from ...core.fields import Positive, check
from .fingerprints import Fingerprinter
from .provider import hidden_ids
from .receipt import HiddenReasoning

__all__ = ["KINDS", "Inflater"]

Kind = Literal["random", "off-topic", "same-topic", "reasoning", "answer", "prompt", "copy"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PIECE = 16  # tokens that are put in at a place where the padding is spread
NEAREST = 3  # texts that count as of the same topic


class Inflater:
    """Pads reasoning.

    Kinds: `random` tokens of the vocabulary; passages of other reasoning, `off-topic` or of the three whose answers are
    nearest (`same-topic`); tokens drawn from the own `reasoning`, `answer` or `prompt`, one by one; `copy` repeats the
    reasoning itself. The first two are naive, the others know what an audit looks at.

    Args:
        others: whose reasoning passages are taken from.
    """

    def __init__(self, fingerprinter: Fingerprinter, others: Sequence[HiddenReasoning]) -> None:
        if isinstance(others, str) or len(others) <= NEAREST:
            raise InputError(f"padding takes more than {NEAREST} other texts; give a list of them")
        self.fingerprinter = fingerprinter
        self.others = [hidden_ids(one, fingerprinter) for one in others]
        self.topics = np.stack([self._topic(one) for one in others])
        special = set(fingerprinter.tokenizer.all_special_ids)
        self.vocabulary = [i for i in range(len(fingerprinter.tokenizer)) if i not in special]

    def inflate(
        self, trace: HiddenReasoning, kind: Kind, ratio: float, seed: int, place: Literal["end", "spread"] = "end"
    ) -> HiddenReasoning:
        """The trace with `ratio` times its tokens added.

        Args:
            place: behind the reasoning, or in pieces of 16 tokens at random places in it.

        Raises:
            InputError: a kind that is not known, or one whose text is empty.
        """
        check("ratio", ratio, Positive)
        if kind not in KINDS:
            raise InputError(f"the kind of padding {kind!r} is not known; give one of {', '.join(KINDS)}")
        rng, ids = random.Random(seed), hidden_ids(trace, self.fingerprinter)
        added = self._padding(trace, ids, kind, max(1, round(ratio * len(ids))), rng)
        padded = ids + added if place == "end" else spread(ids, added, rng)
        return trace.model_copy(update={"reasoning": padded})

    def _padding(self, trace: HiddenReasoning, ids: list[int], kind: Kind, count: int, rng: random.Random) -> list[int]:
        if kind in ("off-topic", "same-topic"):
            return self._passages(trace, ids, kind == "same-topic", count, rng)
        if kind == "copy":
            return [ids[i % len(ids)] for i in range(count)]
        text = {"answer": trace.answer, "prompt": trace.prompt}.get(kind)
        own = self.fingerprinter.tokenizer(text, add_special_tokens=False)["input_ids"] if text is not None else ids
        pool = self.vocabulary if kind == "random" else own
        if not pool:
            raise InputError(f"padding from the {kind} needs some; the {kind} is empty")
        return rng.choices(pool, k=count)

    def _passages(
        self, trace: HiddenReasoning, ids: list[int], near: bool, count: int, rng: random.Random
    ) -> list[int]:
        """Stretches of up to 64 tokens of other reasoning."""
        likeness = self.topics @ self._topic(trace)
        order = [i for i in np.argsort(-likeness, kind="stable").tolist() if self.others[i] != ids]
        pool = order[:NEAREST] if near else order[len(order) // 2 :]
        found: list[int] = []
        while len(found) < count:
            other = self.others[rng.choice(pool)]
            start = rng.randrange(max(1, len(other) - 64))
            found += other[start : start + 64]
        return found[:count]

    def _topic(self, trace: HiddenReasoning) -> np.ndarray:
        mean = self.fingerprinter.answer(trace.answer).astype(float).mean(0)
        return mean / max(1e-12, float(np.linalg.norm(mean)))


def spread(ids: Sequence[int], added: Sequence[int], rng: random.Random) -> list[int]:
    """Pieces of what is added, in order, at random places."""
    pieces = [added[i : i + PIECE] for i in range(0, len(added), PIECE)]
    places = sorted(rng.randrange(len(ids) + 1) for _ in pieces)
    out, last = [], 0
    for place, piece in zip(places, pieces):
        out += [*ids[last:place], *piece]
        last = place
    return [*out, *ids[last:]]
