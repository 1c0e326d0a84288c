"""Beam search that is pulled towards a reference wherever the model would plausibly say the same.

Each beam has a pointer r into its reference and a count c of words that have left it. Both follow from the tokens of
the beam alone, so that the processor needs no state of its own and works in plain `generate(num_beams=...)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
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
        tokens: (references, places, 2 window + 1): the one at the place itself, then `window` before it, then as many
            behind it, in the order in which they count. Beyond the ends of a reference stand its first and its last.
        since: (2 window + 1,): the fewest tokens since the last agreement with which meeting it counts.
        move: (2 window + 1,): how far the pointer goes then.
    """

    tokens: np.ndarray
    since: np.ndarray
    move: np.ndarray

    @classmethod
    def of(cls, references: np.ndarray, lengths: np.ndarray, window: int) -> Near:
        """Of references (references, length), padded on the right, with their lengths (references,)."""
        w = np.arange(window)
        offset = np.concatenate([[0], -1 - w, 1 + w])
        places = np.arange(references.shape[1] + window)[:, None] + offset
        held = np.minimum(places.clip(min=0), lengths[:, None, None] - 1)
        tokens = references[np.arange(len(references))[:, None, None], held]
        return cls(tokens, np.concatenate([[0], 1 + w, 0 * w]), 1 + offset)


class Pointer(NamedTuple):
    """Of each beam (references, beams): the place `r` in its reference, and the tokens `c` since it last agreed."""

    r: np.ndarray
    c: np.ndarray

    @classmethod
    def start(cls, references: int, beams: int) -> Pointer:
        """Before the first token."""
        return cls(*np.zeros((2, references, beams), int))

    def advanced(self, token: np.ndarray, near: Near) -> Pointer:
        """After one more token (references, beams) of each.

        The token at the pointer agrees. One before it was said already: something was put in. One behind it comes
        later: something was left out. Before any other the pointer just goes on.
        """
        row, last = np.arange(len(token))[:, None], near.tokens.shape[1] - 1
        met = near.tokens[row, np.minimum(self.r, last)] == token[..., None]
        met &= self.c[..., None] >= near.since
        moved = self.r + near.move[met.argmax(-1)]  # by the first that is met; if none is, as if it were the first
        return Pointer(moved, np.where(met.any(-1), 0, self.c + 1))

    def of(self, parent: np.ndarray) -> Pointer:
        """Those of other beams (references, beams) of the same references."""
        row = np.arange(len(parent))[:, None]
        return Pointer(self.r[row, parent], self.c[row, parent])


def pointers(written: np.ndarray, near: Near) -> Pointer:
    """Where beams (references, beams, time) of tokens stand in their references, from the tokens alone."""
    found = Pointer.start(*written.shape[:2])
    for token in np.moveaxis(written, -1, 0):
        found = found.advanced(token, near)
    return found


class _References:
    """All that does not depend on what is written.

    Attributes:
        ids: (references, length), padded on the right.
        last: (references, 1): the place of the end of each.
        near: the tokens around each place.
        present: (references, 1, length): 1 in a reference, 0 behind its end.
        same: (references, length, length): whether two places hold the same token.
        once: (references, length, 1): 1 at the first place of a token, 0 at the others.
        closeness: (length + 1, length): 1 / (distance + 1)^2 at and behind a place of the reference, 0 before.
    """

    def __init__(self, references: Sequence[Sequence[int]], fill: int, window: int) -> None:
        ids, present = (one.numpy() for one in right_padded(references, fill))
        length = ids.shape[1]
        place = np.arange(length)
        distance = place - np.arange(length + 1)[:, None]
        same = ids[:, :, None] == ids[:, None]
        self.ids, self.last = ids, present.sum(1, keepdims=True) - 1
        self.near = Near.of(ids, present.sum(1), window)
        self.present, self.same = present[:, None].astype(np.float32), same.astype(np.float32)
        self.once = (same.argmax(2) == place)[..., None].astype(np.float32)
        self.closeness = np.where(distance >= 0, 1 / (distance.clip(min=0) + 1) ** 2, 0).astype(np.float32)

    def share(self, found: Pointer, tau: float) -> np.ndarray:
        """q (references, beams, length): the reference's share in what is sampled from, of the token at each place.

        A token that stands at several places has one share, the softmax of the sum of its weights; 0 where that is 0.
        """
        agreed = np.minimum(found.r - found.c, self.ids.shape[1])
        weight = (self.closeness[np.minimum(found.r, self.last)] + self.closeness[agreed]) * self.present / 2
        of_token = weight @ self.same
        size = np.exp((of_token - of_token.max(-1, keepdims=True)) / np.float32(tau)) * (of_token > 0)
        return size / (size @ self.once)


class _Step(NamedTuple):
    """What the last call was given, and the pointers it found."""

    written: np.ndarray
    found: Pointer


class ReferenceConstrainedLogitsProcessor(LogitsProcessor):
    """For `model.generate(..., num_beams=5, logits_processor=[it])`: translations close to their references.

    What concerns the references is small, and NumPy's; only what concerns the vocabulary is done where the scores are.

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
        self.references = _References(references, self.eos, self.constraint.window)
        self._ids: dict[tuple[int, torch.device], Tensor] = {}
        self._last: _Step | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Any:
        """Scores (rows * beams, vocabulary), logits or their logarithms of probabilities, with the pull."""
        count, rows = len(self.references.ids), len(input_ids)
        if not rows or rows % count:
            raise InputError(f"{rows} rows are written for {count} references; give one for each prompt")
        if self.constraint.lam == 1:
            pulled = scores.clone()
        else:
            written = input_ids[:, self.start :].cpu().numpy().copy()  # generate may write on in its own
            pulled = self._pulled(scores, self._pointers(written.reshape(count, rows // count, -1)))
        if self.pad != self.eos:
            pulled[:, self.pad] = -torch.inf
        if input_ids.shape[1] == self.start:
            pulled[:, self.eos] = -torch.inf
        return pulled

    def _pointers(self, written: np.ndarray) -> Pointer:
        """`pointers`, which follow in one step where every beam goes on from one of the last call."""
        last, near, found = self._last, self.references.near, None
        if last is not None and last.written.shape == (*written.shape[:2], written.shape[2] - 1):
            known = (written[:, :, None, :-1] == last.written[:, None]).all(-1)
            if known.any(-1).all():
                found = last.found.of(known.argmax(-1)).advanced(written[..., -1], near)
        found = found or pointers(written, near)
        self._last = _Step(written, found)
        return found

    def _pulled(self, scores: Tensor, found: Pointer) -> Tensor:
        """lam p + (1 - lam) q where the reference's next token is likely enough, otherwise the scores as they are.

        Only tokens of the reference get a share of q, so that all others are multiplied by lam alone.
        """
        theta, lam, tau, _ = self.constraint
        ids = self._ids_for(scores)
        r, q = (
            torch.from_numpy(one).flatten(0, 1).to(scores.device)
            for one in (np.minimum(found.r, self.references.last)[..., None], self.references.share(found, tau))
        )
        logp = scores.log_softmax(-1)
        p = logp.gather(1, ids).exp_()
        free = p.gather(1, r) <= theta
        mixed = p.mul_(lam).add_(q, alpha=1 - lam).log_()
        pulled = logp.add_(math.log(lam) if lam else -torch.inf).scatter_(1, ids, mixed)
        return torch.where(free, scores, pulled)

    def _ids_for(self, scores: Tensor) -> Tensor:
        """The reference (rows * beams, length) of each row, where the scores are."""
        key = len(scores), scores.device
        if key not in self._ids:
            beams = len(scores) // len(self.references.ids)
            self._ids[key] = torch.from_numpy(self.references.ids).to(scores.device).repeat_interleave(beams, 0)
        return self._ids[key]


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
