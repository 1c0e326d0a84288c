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


class Near(NamedTuple):
    """The tokens around every place of references, and what it means to meet one of them.

    Attributes:
        tokens: (rows * places, 2 window + 1): the one at the place itself, then `window` before it, then as many behind
            it, in the order in which they count. Beyond the ends of a reference stand its first and its last.
        begin: (rows,): where the places of each begin.
        since: (2 window + 1,): the fewest tokens since the last agreement with which meeting it counts.
        move: (2 window + 1,): how far the pointer goes then.
    """

    tokens: Tensor
    begin: Tensor
    since: Tensor
    move: Tensor

    @classmethod
    def of(cls, references: Tensor, lengths: Tensor, window: int) -> Near:
        """Of references (rows, length), padded on the right, with their lengths (rows,)."""
        w, zero = torch.arange(window, device=references.device), torch.zeros_like(lengths[:1])
        offset = torch.cat([zero, -1 - w, 1 + w])
        places = torch.arange(references.shape[1] + window, device=references.device)[:, None] + offset
        held = places.clamp(min=0)[None].minimum(lengths[:, None, None] - 1)
        tokens = references.gather(1, held.flatten(1)).reshape(-1, len(offset))
        begin = torch.arange(len(references), device=references.device) * len(places)
        return cls(tokens, begin, torch.cat([zero, 1 + w, torch.zeros_like(w)]), 1 + offset)

    @property
    def last(self) -> int:
        """The place from which on all tokens around it are the end."""
        return len(self.tokens) // len(self.begin) - 1


class Pointer(NamedTuple):
    """Of each row: the place `r` in its reference, and the tokens `c` since it last agreed with it."""

    r: Tensor
    c: Tensor

    @classmethod
    def start(cls, rows: int, device: torch.device) -> Pointer:
        """Before the first token."""
        return cls(*torch.zeros(2, rows, dtype=torch.long, device=device))

    def advanced(self, token: Tensor, near: Near) -> Pointer:
        """After one more token (rows,) of each.

        The token at the pointer agrees. One before it was said already: something was put in. One behind it comes
        later: something was left out. Before any other the pointer just goes on.
        """
        around = near.tokens.index_select(0, self.r.clamp(max=near.last) + near.begin)
        met = (around == token[:, None]) & (self.c[:, None] >= near.since)
        agrees, which = met.max(1)  # the first one of several; where none is met, the move of the first one, too
        return Pointer(self.r + near.move.index_select(0, which), (self.c + 1).masked_fill_(agrees, 0))


def pointers(written: Tensor, near: Near) -> Pointer:
    """Where rows (rows, time) of tokens stand in their references, from the tokens alone."""
    found = Pointer.start(len(written), written.device)
    for token in written.unbind(1):
        found = found.advanced(token, near)
    return found


class _Rows(NamedTuple):
    """What is known of the references of every row beforehand.

    Attributes:
        references: (rows, length), padded on the right.
        last: (rows,): the place of the end of each.
        first: (rows, length): for each place the first one with the same token.
        near: the tokens around each place.
        share: (rows, length): 1/2 in a reference, 0 behind its end.
        closeness: (length + 1, length): 1 / (distance + 1)^2 at and behind a place of the reference, 0 before.
        group: (rows,): the first row of the beams of the same reference.
    """

    references: Tensor
    last: Tensor
    first: Tensor
    near: Near
    share: Tensor
    closeness: Tensor
    group: Tensor

    @classmethod
    def of(cls, references: Sequence[Sequence[int]], fill: int, window: int, beams: int, device: torch.device) -> _Rows:
        """A row for each beam."""
        ids, present = (one.to(device).repeat_interleave(beams, 0) for one in right_padded(references, fill))
        lengths, place = present.sum(1), torch.arange(ids.shape[1], device=device)
        distance = place - torch.arange(ids.shape[1] + 1, device=device)[:, None]
        return cls(
            ids,
            lengths - 1,
            (ids[:, :, None] == ids[:, None]).int().argmax(2),
            Near.of(ids, lengths, window),
            present / 2,
            torch.where(distance >= 0, 1 / (distance + 1.0).square(), 0),
            torch.arange(len(ids), device=device) // beams * beams,
        )


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
        self.references = [list(ids) for ids in references]
        self._rows: dict[tuple[int, torch.device], _Rows] = {}
        self._last: _Step | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        """Scores (rows * beams, vocabulary), logits or their logarithms of probabilities, with the pull."""
        rows, window = len(input_ids), self.constraint.window
        key = self._beams(rows), scores.device
        if key not in self._rows:
            self._rows[key] = _Rows.of(self.references, self.eos, window, *key)
        found = self._pointers(input_ids[:, self.start :], self._rows[key])
        pulled = scores.clone() if self.constraint.lam == 1 else self._pulled(scores, found, self._rows[key])
        if self.pad != self.eos:
            pulled[:, self.pad] = -torch.inf
        if input_ids.shape[1] == self.start:
            pulled[:, self.eos] = -torch.inf
        return pulled

    def _beams(self, rows: int) -> int:
        beams, over = divmod(rows, len(self.references))
        if over or not beams:
            raise InputError(f"{rows} rows are written for {len(self.references)} references; give one for each prompt")
        return beams

    def _pointers(self, written: Tensor, rows: _Rows) -> Pointer:
        """`pointers`, which follow in one step where every row goes on from a row of the last call."""
        last, found = self._last, None
        if last is not None and last.written.shape == (len(written), written.shape[1] - 1):
            now, then = (one.unflatten(0, (len(self.references), -1)) for one in (written[:, :-1], last.written))
            known, parent = (now[:, :, None] == then[:, None]).all(-1).max(-1)
            if bool(known.all()):
                parent = parent.flatten() + rows.group
                before = Pointer(*(one.index_select(0, parent) for one in last.found))
                found = before.advanced(written[:, -1], rows.near)
        found = found or pointers(written, rows.near)
        self._last = _Step(written, found)
        return found

    def _pulled(self, scores: Tensor, found: Pointer, rows: _Rows) -> Tensor:
        """lam p + (1 - lam) q where the reference's next token is likely enough, otherwise the scores as they are.

        Only tokens of the reference get a share of q, so that all others are multiplied by lam alone. One copy of the
        scores is made: it first holds what the sum over the vocabulary needs, then the result.
        """
        theta, lam, tau, _ = self.constraint
        highest = scores.amax(-1, keepdim=True)
        pulled = scores - highest
        total = pulled.exp_().sum(-1, keepdim=True).log_().add_(highest)
        own = scores.gather(1, rows.references)
        p = (own - total).exp_()
        r = found.r.minimum(rows.last)
        free = p.gather(1, r[:, None]) <= theta
        agreed = (found.r - found.c).clamp_(max=rows.closeness.shape[1])
        weight = rows.closeness.index_select(0, r).add_(rows.closeness.index_select(0, agreed)).mul_(rows.share)
        of_token = torch.zeros_like(weight).scatter_add_(1, rows.first, weight)  # it counts once in the softmax
        q = (of_token / tau).masked_fill_(of_token == 0, -torch.inf).softmax(-1).gather(1, rows.first)
        lower = ((math.log(lam) if lam else -torch.inf) - total).masked_fill_(free, 0)
        mixed = p.mul_(lam).add_(q.mul_(1 - lam)).log_()
        return torch.add(scores, lower, out=pulled).scatter_(1, rows.references, torch.where(free, own, mixed))


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
