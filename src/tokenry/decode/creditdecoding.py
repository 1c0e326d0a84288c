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

from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Entries, Portion, Share, Weight, read_none
from .denoising.contract import DiffusionMethod, DiffusionParts
from .denoising.loop import LogitsTransform
from .denoising.state import DiffusionState, Edit

__all__ = ["CreditDecoding", "CreditFusion"]

Scope = Literal["block", "sequence"]
Slots = Annotated[Entries | None, BeforeValidator(read_none)]


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
    published: ClassVar[Claim] = Claim(
        "5.48", "times faster than one token per step, +0.48 points", "LLaDA-8B-Instruct, eight benchmarks"
    )

    alpha: Weight = Field(default=0.7, description="weight of the credit; 0 is threshold decoding")
    gamma: Portion = Field(default=0.2, description="exponent on the probability of the best token")
    beta: Share = Field(default=0.8, description="what is left of the credit after a step")
    threshold: Portion = Field(default=0.9, description="tokens at least this probable are committed")
    slots: Slots = Field(default=None, description="tokens that a position remembers; none for the whole vocabulary")
    scope: Scope = Field(
        default="block", description="credit begins anew with each block, or lasts for the whole window"
    )

    def parts(self, max_new_tokens: int) -> DiffusionParts:
        credit = CreditFusion(self.alpha, self.gamma, self.beta, self.slots, self.scope)
        return DiffusionParts(threshold=self.threshold, transforms=(credit,) if self.alpha else ())


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
        self.begun, self.values = False, torch.empty(0)  # (batch, window, vocabulary or slots) float32
        self.ids: Tensor | None = None  # (batch, window, slots) the token of each slot
        self.start = self.vocabulary = 0

    def reset(self, state: DiffusionState) -> None:
        """A new generation starts: no credit."""
        self.begun, self.values, self.ids = False, torch.empty(0), None

    def reindex(self, edit: Edit) -> None:
        """Columns have moved, and their credit with them; new masks have none."""
        if self.begun:
            edit = edit.after(self.start)
            self.values = edit.take(self.values, 0.0)
            self.ids = None if self.ids is None else edit.take(self.ids, EMPTY)

    @property
    def credit(self) -> Tensor:
        """The credit (batch, time, vocabulary) as it is now, 0 outside what has gathered some."""
        if not self.begun:
            raise InputError("there is no credit yet; generate something first")
        batch, window = self.values.shape[:2]
        whole = torch.zeros(batch, self.start + window, self.vocabulary, device=self.values.device)
        if self.ids is None:
            whole[:, self.start :] = self.values
        else:
            whole[:, self.start :].scatter_add_(2, self.ids.clamp(min=0), self.values)
        return whole

    def __call__(self, logits: Tensor, state: DiffusionState) -> Tensor:
        if not self.begun:
            self._begin(logits, state)
        self._check(logits)
        where = state.in_block if self.scope == "block" else state.in_window
        if self.scope == "block":
            self._forget(state.block_step == 0)
        # A vocabulary is long: only the columns are looked at where some row may earn or use credit.
        columns = where.any(0).nonzero()
        span = slice(int(columns[0]), int(columns[-1]) + 1)
        earning = where & state.masked & state.working[:, None]
        self._add(logits[:, span].float(), earning[:, span], state.working, span)
        boost = self._part(self.values, span).log1p().mul_(self.alpha).masked_fill_(~where[:, span, None], 0.0)
        fused = logits.clone()
        if self.ids is None:
            fused[:, span] += boost
        else:
            fused[:, span].scatter_add_(2, self._part(self.ids, span).clamp(min=0), boost)
        return fused

    def _part(self, values: Tensor, span: slice) -> Tensor:
        """A view of these columns."""
        return values[:, span.start - self.start : span.stop - self.start]

    def _check(self, logits: Tensor) -> None:
        credit = (self.values.shape[0], self.start + self.values.shape[1], self.vocabulary)
        if credit != logits.shape:
            raise InputError(f"credit has shape {credit}, logits {tuple(logits.shape)}; call reset or reindex")

    def _begin(self, logits: Tensor, state: DiffusionState) -> None:
        self.begun, self.start, self.vocabulary = True, state.start, logits.shape[-1]
        shape = (logits.shape[0], logits.shape[1] - state.start, self.slots or self.vocabulary)
        self.values = torch.zeros(shape, device=logits.device)
        self.ids = None if self.slots is None else torch.full(shape, EMPTY, device=logits.device)

    def _forget(self, rows: Tensor) -> None:
        """A row (batch,) that is at the first step of a block has no credit."""
        self.values[rows] = 0.0
        if self.ids is not None:
            self.ids[rows] = EMPTY

    def _add(self, logits: Tensor, earning: Tensor, working: Tensor, span: slice) -> None:
        """Decay, and the credit of the best token of every column (batch, columns of the span) that earns some."""
        values = self._part(self.values, span)
        # Rows that are done, or wait for the batch, keep what they have.
        values.mul_(torch.where(working, self.beta, 1.0)[:, None, None])
        highest, best = logits.max(-1, keepdim=True)
        if not highest.isfinite().all():
            raise InputError("the logits are not finite; look for an overflow in the model, or use float32")
        p = (highest - logits.logsumexp(-1, keepdim=True)).exp()
        earned = (p**self.gamma).masked_fill(~earning[..., None], 0.0)
        slot = best if self.ids is None else self._slot(best, earning, values, self._part(self.ids, span))
        values.scatter_add_(2, slot, earned)

    def _slot(self, best: Tensor, earning: Tensor, values: Tensor, ids: Tensor) -> Tensor:
        """The slot (batch, columns, 1) of the best token: its own, else a free one, else that with the least credit."""
        own = ids == best
        slot = values.masked_fill(ids == EMPTY, -1.0).masked_fill(own, -2.0).argmin(-1, keepdim=True)
        new = earning[..., None] & ~own.any(-1, keepdim=True)
        values.scatter_(2, slot, values.gather(2, slot).masked_fill(new, 0.0))
        ids.scatter_(2, slot, torch.where(new, best, ids.gather(2, slot)))
        return slot
