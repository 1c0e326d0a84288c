"""Beam search that is pulled towards a reference wherever the model would plausibly say the same.

Each beam has a pointer r into its reference and a count c of words that have left it. Both follow from the tokens of
the beam alone, so that the processor needs no state of its own and works in plain `generate(num_beams=...)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.fields import Positive, Probability, check
from ...models.batch import pad_id, right_padded

__all__ = ["Constraint", "ReferenceConstrainedLogitsProcessor", "pointers"]


class Constraint(NamedTuple):
    """How strong the pull is.

    Attributes:
        theta: the reference's next token must be likelier than this for any pull.
        lam: the model's share in what is then sampled from; 1 is plain search.
        tau: temperature of the reference's share.
        window: how many tokens too many, or left out, the pointer sees through.
    """

    theta: float = 0.05
    lam: float = 0.2
    tau: float = 0.2
    window: int = 3

    def checked(self) -> Constraint:
        """Itself.

        Raises:
            InputError: theta or lam outside [0, 1], tau <= 0, or a negative window.
        """
        check("theta", self.theta, Probability)
        check("lam", self.lam, Probability)
        check("tau", self.tau, Positive)
        if self.window < 0:
            raise InputError(f"window={self.window} is not allowed; give a number >= 0")
        return self


class Pointer(NamedTuple):
    """Of each row: the place `r` in its reference, and the tokens `c` since it last agreed with it."""

    r: Tensor
    c: Tensor

    def advanced(self, token: Tensor, references: Tensor, lengths: Tensor, window: int) -> Pointer:
        """After one more token (rows,) of each; references (rows, length) are padded on the right."""

        w = torch.arange(window, device=token.device)
        last = lengths[:, None] - 1

        def is_at(places: Tensor) -> Tensor:
            return references.gather(1, places.clamp(min=0).minimum(last)) == token[:, None]

        r = self.r + 1
        c = torch.where(is_at(self.r[:, None])[:, 0], 0, self.c + 1)
        if window == 0:
            return Pointer(r, c)
        back = (c[:, None] > 1 + w) & is_at(r[:, None] - w - 2)  # it was said before: something was put in
        r, c = _first(back, r, -1 - back.int().argmax(1), c)
        ahead = (c[:, None] > 0) & is_at(r[:, None] + w)  # it comes later: something was left out
        return Pointer(*_first(ahead, r, 1 + ahead.int().argmax(1), c))


def _first(hits: Tensor, r: Tensor, move: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """The pointers (rows,) after a move where there are hits (rows, window); what agrees again counts from 0."""
    hit = hits.any(1)
    return torch.where(hit, r + move, r), c.masked_fill(hit, 0)


def pointers(written: Tensor, references: Tensor, lengths: Tensor, window: int) -> Pointer:
    """Where rows (rows, time) of tokens stand in their references (rows, length), from the tokens alone."""
    zero = torch.zeros_like(lengths)
    found = Pointer(zero, zero)
    for token in written.unbind(1):
        found = found.advanced(token, references, lengths, window)
    return found


class _Rows(NamedTuple):
    """References (rows, length), padded on the right, their lengths (rows,), and for each place the first one with the
    same token (rows, length)."""

    references: Tensor
    lengths: Tensor
    first: Tensor

    def repeated(self, beams: int, device: torch.device) -> _Rows:
        """A row for each beam."""
        return _Rows(*(one.to(device).repeat_interleave(beams, 0) for one in self))


class _Step(NamedTuple):
    """What the last call was given, and the pointers it found."""

    written: Tensor
    found: Pointer


class ReferenceConstrainedLogitsProcessor(LogitsProcessor):
    """For `model.generate(..., num_beams=5, logits_processor=[it])`: translations close to their references.

    Args:
        references: token ids of the reference of each row, that end with the tokenizer's end-of-text token.
        start: tokens of a row before the first that is written: 1 for encoder-decoder models, whose rows begin with the
            decoder's start token; the width of the prompts for others.

    Raises:
        InputError: no references, one that is empty or does not end, or a constraint out of its range.
    """

    def __init__(
        self,
        references: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
        constraint: Constraint | None = None,
        start: int = 1,
    ) -> None:
        self.constraint, self.start = (constraint or Constraint()).checked(), start
        self.eos, self.pad = _eos_of(tokenizer), pad_id(tokenizer)
        check_references(references, self.eos)
        ids, present = right_padded(references, self.eos)
        self.rows = _Rows(ids, present.sum(1), (ids[:, :, None] == ids[:, None]).int().argmax(2))
        self._repeated: dict[tuple[int, torch.device], _Rows] = {}
        self._last: _Step | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        """Scores (rows * beams, vocabulary), logits or their logarithms of probabilities, with the pull."""
        key = self._beams(len(input_ids)), scores.device
        if key not in self._repeated:
            self._repeated[key] = self.rows.repeated(*key)
        rows = self._repeated[key]
        found = self._pointers(input_ids[:, self.start :], rows)
        pulled = scores.clone() if self.constraint.lam == 1 else self._pulled(scores, found, rows)
        if self.pad != self.eos:
            pulled[:, self.pad] = -torch.inf
        if input_ids.shape[1] == self.start:
            pulled[:, self.eos] = -torch.inf
        return pulled

    def _beams(self, rows: int) -> int:
        beams, over = divmod(rows, len(self.rows.lengths))
        if over or not beams:
            raise InputError(
                f"{rows} rows are written for {len(self.rows.lengths)} references; give one for each prompt"
            )
        return beams

    def _pointers(self, written: Tensor, rows: _Rows) -> Pointer:
        """`pointers`, which follow in one step where every row goes on from a row of the last call."""
        last, window, (references, lengths, _) = self._last, self.constraint.window, rows
        found = None
        if last is not None and last.written.shape == (len(written), written.shape[1] - 1):
            count = len(self.rows.lengths)
            shape = (count, len(written) // count, last.written.shape[1])
            same = (written[:, :-1].reshape(shape)[:, :, None] == last.written.reshape(shape)[:, None]).all(-1)
            if same.any(-1).all():
                beams = same.shape[1]
                first = torch.arange(len(written), device=written.device) // beams * beams
                parent = first + same.int().argmax(-1).flatten()
                before = Pointer(last.found.r[parent], last.found.c[parent])
                found = before.advanced(written[:, -1], references, lengths, window)
        found = found or pointers(written, references, lengths, window)
        self._last = _Step(written, found)
        return found

    def _pulled(self, scores: Tensor, found: Pointer, rows: _Rows) -> Tensor:
        """lam p + (1 - lam) q where the reference's next token is likely enough, otherwise the scores as they are.

        Only tokens of the reference get a share of q, so that all others are multiplied by lam alone.
        """
        theta, lam, tau, _ = self.constraint
        references, lengths, first = rows
        total, own = scores.logsumexp(-1, keepdim=True), scores.gather(1, references)
        p = (own - total).exp()
        place, r = torch.arange(references.shape[1], device=scores.device), found.r.minimum(lengths - 1)
        pull = p.gather(1, r[:, None]) > theta
        weight = (_weights(place, r) + _weights(place, found.r - found.c)) / 2
        weight = weight.masked_fill(place >= lengths[:, None], 0)
        of_token = torch.zeros_like(weight).scatter_add(1, first, weight)  # a token counts once in the softmax
        q = (of_token / tau).masked_fill(of_token == 0, -torch.inf).softmax(-1).gather(1, first)
        pulled = scores + torch.where(pull, (math.log(lam) if lam else -torch.inf) - total, 0)
        return pulled.scatter(1, references, torch.where(pull, (lam * p + (1 - lam) * q).log(), own))


def _weights(place: Tensor, first: Tensor) -> Tensor:
    """1 / (distance + 1)^2 at and behind a place of the reference, 0 before."""
    distance = place - first[:, None]
    return torch.where(distance >= 0, 1 / (distance + 1.0).square(), 0)


def _eos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token, by which references end; set tokenizer.eos_token")
    return int(tokenizer.eos_token_id)  # pyright: ignore[reportArgumentType]  # of a tokenizer it is one number


def check_references(references: Sequence[Sequence[int]], eos: int) -> None:
    """Refuse references that are not there, empty, or without their end."""
    if not len(references):
        raise InputError("there are no references; give the token ids of one for each prompt")
    for i, ids in enumerate(references):
        if not len(ids) or list(ids) == [eos]:
            raise InputError(f"reference {i + 1} is empty; give a translation")
        if ids[-1] != eos:
            raise InputError(f"reference {i + 1} does not end with the end-of-text token {eos}; add it")
