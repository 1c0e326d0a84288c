"""CreditDecoding: predictions that have been the best for some steps are committed earlier.

Paper: CreditDecoding: Accelerating Parallel Decoding in Diffusion Large Language Models with Trace Credit(s), arXiv
2510.06133. While a masked-diffusion model denoises, the right token is often the best one for several steps before its
probability passes the threshold. Each position keeps a decaying sum of how often, and how surely, each token was the
best; alpha * log(1 + sum) is added to its logit.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from ..errors import InputError
from .diffusion import LogitsTransform
from .diffusion_method import DiffusionMethod, DiffusionParts
from .diffusion_state import DiffusionState, Edit
from .thinking import read_none

__all__ = ["CreditDecoding", "CreditFusion"]

Scope = Literal["block", "sequence"]
EMPTY = -1  # a slot without a token


class CreditFusion(LogitsTransform):
    """Adds alpha * log(1 + C) to the logits, C being the trace credit (arXiv 2510.06133).

    One step, p being the softmax of the logits and v* the best token of a masked position:
    C <- beta * C, except in the first step of a block; C[v*] <- C[v*] + p[v*] ** gamma; logits + alpha * log(1 + C).

    A token that is the best one in every step has C < 1 / (1 - beta), so no logit rises by more than
    alpha * log(1 + 1 / (1 - beta)).

    Args:
        alpha: weight of the credit, >= 0; 0 changes nothing.
        gamma: exponent in (0, 1]; below 1 it lifts small probabilities.
        beta: what is left of the credit after a step, in [0, 1).
        slots: tokens that a position remembers, the one with the least credit giving way; None: all of the vocabulary.
            The same credit with less memory, as long as no more than that many tokens were ever the best.
        scope: credit is gathered in the block and begins anew with each ("block"), or in the whole window.

    Raises:
        InputError: a parameter out of range; when called, logits of another shape than the credit, or not finite.
    """

    def __init__(
        self,
        alpha: float = 0.7,
        gamma: float = 0.2,
        beta: float = 0.8,
        slots: int | None = None,
        scope: Scope = "block",
    ) -> None:
        for name, value, fits, allowed in (
            ("alpha", alpha, 0 <= alpha < float("inf"), "a number >= 0"),
            ("gamma", gamma, 0 < gamma <= 1, "a number in (0, 1]"),
            ("beta", beta, 0 <= beta < 1, "a number in [0, 1)"),
            ("slots", slots, slots is None or slots >= 1, "a number >= 1, or None for the whole vocabulary"),
            ("scope", scope, scope in ("block", "sequence"), "'block' or 'sequence'"),
        ):
            if not fits:
                raise InputError(f"{name}={value!r} is not allowed; give {allowed}")
        self.alpha, self.gamma, self.beta, self.slots, self.scope = alpha, gamma, beta, slots, scope
        self.values: Tensor | None = None  # (batch, time, vocabulary or slots) float32
        self.ids: Tensor | None = None  # (batch, time, slots) the token of each slot
        self.vocabulary = 0

    def reset(self, state: DiffusionState) -> None:
        """A new generation starts: no credit."""
        self.values = self.ids = None

    def reindex(self, edit: Edit) -> None:
        """Columns have moved, and their credit with them; new masks have none."""
        if self.values is not None:
            self.values = edit.take(self.values, 0.0)
            self.ids = None if self.ids is None else edit.take(self.ids, EMPTY)

    @property
    def credit(self) -> Tensor:
        """The credit (batch, time, vocabulary) as it is now, 0 outside what has gathered some."""
        if self.values is None:
            raise InputError("there is no credit yet; generate something first")
        if self.ids is None:
            return self.values
        whole = torch.zeros(*self.values.shape[:2], self.vocabulary, device=self.values.device)
        return whole.scatter_add(2, self.ids.clamp(min=0), self.values)

    def __call__(self, logits: Tensor, state: DiffusionState) -> Tensor:
        self._check(logits)
        if self.values is None:
            self._begin(logits)
        where = state.in_block if self.scope == "block" else state.in_window
        if self.scope == "block":
            self._forget(state.block_step == 0)
        self._add(logits, where & state.masked, state)
        boost = self.alpha * self.values.log1p()
        if self.ids is None:
            return torch.where(where[..., None], logits + boost, logits)
        boost = boost.masked_fill(~where[..., None], 0.0)
        return logits.scatter_add(2, self.ids.clamp(min=0), boost)

    def _check(self, logits: Tensor) -> None:
        if torch.isnan(logits).any() or (logits == torch.inf).any() or (logits == -torch.inf).all(-1).any():
            raise InputError("the logits are not finite; look for an overflow in the model, or use float32")
        if self.values is not None and (*self.values.shape[:2], self.vocabulary) != logits.shape:
            credit, given = (*self.values.shape[:2], self.vocabulary), tuple(logits.shape)
            raise InputError(f"credit has shape {credit}, logits {given}; call reset or reindex")

    def _begin(self, logits: Tensor) -> None:
        self.vocabulary = logits.shape[-1]
        shape = (*logits.shape[:2], self.slots or self.vocabulary)
        self.values = torch.zeros(shape, device=logits.device)
        self.ids = None if self.slots is None else torch.full(shape, EMPTY, device=logits.device)

    def _forget(self, rows: Tensor) -> None:
        """A row (batch,) that is at the first step of a block has no credit."""
        self.values = self.values.masked_fill(rows[:, None, None], 0.0)
        if self.ids is not None:
            self.ids = self.ids.masked_fill(rows[:, None, None], EMPTY)

    def _add(self, logits: Tensor, earning: Tensor, state: DiffusionState) -> None:
        """Decay, and the credit of the best token of every column (batch, time) that earns some."""
        # Rows that are done, or wait for the batch, keep what they have.
        self.values = torch.where(state.working[:, None, None], self.values * self.beta, self.values)
        best = logits.argmax(-1, keepdim=True)
        p = (logits.float().gather(-1, best) - logits.float().logsumexp(-1, keepdim=True)).exp()
        earned = (p**self.gamma).masked_fill(~earning[..., None], 0.0)
        index = best if self.ids is None else self._slot(best, earning)
        self.values = self.values.scatter_add(2, index, earned)

    def _slot(self, best: Tensor, earning: Tensor) -> Tensor:
        """The slot (batch, time, 1) of the best token: its own, else a free one, else that with the least credit."""
        own = self.ids == best
        rank = self.values.masked_fill(self.ids == EMPTY, -1.0).masked_fill(own, -2.0)
        slot = rank.argmin(-1, keepdim=True)
        new = earning[..., None] & ~own.any(-1, keepdim=True)
        self.values = torch.where(new, self.values.scatter(2, slot, 0.0), self.values)
        self.ids = torch.where(new, self.ids.scatter(2, slot, best), self.ids)
        return slot


Slots = Annotated[int | None, BeforeValidator(read_none)]


class CreditDecoding(DiffusionMethod):
    """Threshold decoding of a masked-diffusion model with trace credit."""

    slug: ClassVar[str] = "creditdecoding"
    title: ClassVar[str] = "CreditDecoding"
    paper: ClassVar[str] = (
        "CreditDecoding: Accelerating Parallel Decoding in Diffusion Large Language Models with Trace Credit(s), "
        "arXiv 2510.06133"
    )
    claim: ClassVar[str] = (
        "Masked-diffusion models decode with fewer forward passes, at the same quality, when predictions that have "
        "been the best for some steps get a bonus."
    )

    alpha: float = Field(0.7, ge=0, allow_inf_nan=False, description="weight of the credit; 0 is threshold decoding")
    gamma: float = Field(0.2, gt=0, le=1, description="exponent on the probability of the best token")
    beta: float = Field(0.8, ge=0, lt=1, description="what is left of the credit after a step")
    threshold: float = Field(0.9, gt=0, le=1, description="tokens at least this probable are committed")
    slots: Slots = Field(None, ge=1, description="tokens that a position remembers; none for the whole vocabulary")
    scope: Scope = Field("block", description="credit begins anew with each block, or lasts for the whole window")

    def parts(self, max_new_tokens: int) -> DiffusionParts:
        credit = CreditFusion(self.alpha, self.gamma, self.beta, self.slots, self.scope)
        return DiffusionParts(threshold=self.threshold, transforms=(credit,) if self.alpha else ())
