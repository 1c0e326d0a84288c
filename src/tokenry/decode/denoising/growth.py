"""Windows that grow before and while they are filled, as long as the model is not sure of their end."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...core.errors import InputError
from .loop import LengthPolicy, MaskedDiffusionModel
from .state import FRESH, DiffusionState, Edit, Prediction

__all__ = ["DaedalLength", "LengthTrace", "Tail", "eos_confidence"]

Tail = Literal["eos", "mask", "none"]
TAILS: tuple[Tail, ...] = ("eos", "mask", "none")
SILENT = 0.05  # a model that never gets there in a window of the maximum does not know when to end


class DaedalLength(LengthPolicy):
    """Grows windows before and while they are filled (arXiv 2508.00819). They begin with the loop's `gen_length`.

    Before the first step, as long as c, the `eos_confidence` of a row, is below `eos_threshold`, the row gets
    `expansion_factor` more masks at its end, and then eos_check_tokens // 2 committed end-of-text tokens. In each step
    of a row with c below `expand_eos_threshold`, the least confident mask of the block, if its confidence is below
    `low_conf` and it is not committed, is replaced by `expansion_factor` masks. No window grows beyond `maximum`; what
    an insertion pushes out is cut off.

    Args:
        maximum: widest window.
        expansion_factor: masks that come at a time, >= 2.
        low_conf, eos_threshold, expand_eos_threshold: in [0, 1]. With the first two at 0 and no tail, windows stay.
        eos_check_tokens: end-of-text tokens that make a certain end; no more than a short window has room for.
        tail: what windows get after they have grown: end-of-text tokens, as many masks, or nothing.

    Attributes:
        trace: of the last generation.

    Raises:
        InputError: a parameter out of range; when called, a model without end-of-text token, or a window wider than
            the maximum.
    """

    def __init__(
        self,
        maximum: int = 2048,
        expansion_factor: int = 8,
        low_conf: float = 0.1,
        eos_threshold: float = 0.5,
        expand_eos_threshold: float = 0.9,
        eos_check_tokens: int = 32,
        tail: Tail = "eos",
    ) -> None:
        for name, value, fits, allowed in (
            ("maximum", maximum, maximum >= 1, "a number of tokens >= 1"),
            ("expansion_factor", expansion_factor, expansion_factor >= 2, "a number >= 2; a factor of 1 adds nothing"),
            ("low_conf", low_conf, 0 <= low_conf <= 1, "a number in [0, 1]"),
            ("eos_threshold", eos_threshold, 0 <= eos_threshold <= 1, "a number in [0, 1]"),
            ("expand_eos_threshold", expand_eos_threshold, 0 <= expand_eos_threshold <= 1, "a number in [0, 1]"),
            ("eos_check_tokens", eos_check_tokens, eos_check_tokens >= 1, "a number >= 1"),
            ("tail", tail, tail in TAILS, f"one of {', '.join(TAILS)}"),
        ):
            if not fits:
                raise InputError(f"{name}={value!r} is not allowed; give {allowed}")
        self.maximum, self.expansion_factor, self.low_conf = maximum, expansion_factor, low_conf
        self.eos_threshold, self.expand_eos_threshold = eos_threshold, expand_eos_threshold
        self.eos_check_tokens, self.tail = eos_check_tokens, tail
        self.trace = LengthTrace()
        self.eos_token_id: int | None = None
        self.silent: Tensor | None = None  # (batch,) rows that have grown and never had a c of SILENT; None: not asked

    # --- before the first step -------------------------------------------------------------------------------------

    def initial(self, model: MaskedDiffusionModel, state: DiffusionState) -> None:
        if model.eos_token_id is None:
            raise InputError("the model has no end-of-text token; give eos_token_id to MaskedDiffusionModel")
        widest = int(state.gen_length.max())
        if widest > self.maximum:
            raise InputError(f"gen_length={widest} is more than maximum={self.maximum}; lower it or raise the maximum")
        self.trace, self.eos_token_id, self.silent = LengthTrace(), model.eos_token_id, None
        self.grow(model, state)
        self.add_tail(state)

    def grow(self, model: MaskedDiffusionModel, state: DiffusionState) -> None:
        """Widen windows until their ends are end-of-text, or they have the maximum."""
        if self.eos_threshold == 0:
            return
        growing = state.gen_length < self.maximum
        self.silent = growing
        while bool(growing.any()):
            c = self._read(model.predict(state, rows=growing), state)
            self.trace.inserted.append(torch.full_like(state.gen_length, FRESH))
            # A row that is wide enough stays so, whatever others do.
            growing = growing & (c < self.eos_threshold)
            self.silent = self.silent & (c < SILENT)
            state.apply(Edit.resize(state, self._widened(state, growing * self.expansion_factor)))
            growing = growing & (state.gen_length < self.maximum)

    def add_tail(self, state: DiffusionState) -> None:
        """The tokens after a window that has grown."""
        if self.tail == "none":
            return
        before = state.end
        state.apply(Edit.resize(state, self._widened(state, self.eos_check_tokens // 2)))
        if self.tail == "eos":
            state.write(state.in_window & (state.columns >= before[:, None]), self.eos_token_id)

    # --- in each step ----------------------------------------------------------------------------------------------

    def edit(self, prediction: Prediction, commit: Tensor, state: DiffusionState) -> Edit | None:
        c = self._read(prediction.logits, state)
        self._warn(c, state)
        column = self.insertions(prediction, commit, state, c)
        inserting = column != FRESH
        self.trace.inserted.append(torch.where(inserting, column - state.start, FRESH))
        if not bool(inserting.any()):
            return None
        widths = self._widened(state, inserting * (self.expansion_factor - 1))
        return Edit.insert(state, column, self.expansion_factor, widths)

    def insertions(self, prediction: Prediction, commit: Tensor, state: DiffusionState, c: Tensor) -> Tensor:
        """The column (batch,) of each row that is replaced by masks; FRESH for none."""
        # The authors compare the same probabilities, but for the mask token: here it has none.
        unsure = state.candidates & ~commit & (prediction.confidence < self.low_conf)
        lacking = (c < self.expand_eos_threshold) & (state.gen_length < self.maximum) & unsure.any(1)
        least = prediction.confidence.masked_fill(~unsure, torch.inf).argmin(1)
        return torch.where(lacking, least, FRESH)

    # --- both ------------------------------------------------------------------------------------------------------

    def _read(self, logits: Tensor, state: DiffusionState) -> Tensor:
        c = eos_confidence(logits, state.start, state.gen_length, self.eos_token_id, self.eos_check_tokens)
        self.trace.gen_length.append(state.gen_length)
        self.trace.eos_confidence.append(c)
        return c

    def _widened(self, state: DiffusionState, more: Tensor | int) -> Tensor:
        return (state.gen_length + more).clamp(max=self.maximum)

    def _warn(self, c: Tensor, state: DiffusionState) -> None:
        """Once a generation: rows that have grown to the maximum without a sign of an end."""
        if self.silent is None:
            return
        if bool((self.silent & (c < SILENT) & (state.gen_length >= self.maximum)).any()):
            warnings.warn(
                f"a window has grown to maximum={self.maximum}, and nowhere does the model expect its end (confidence "
                f"below {SILENT}); raise the maximum, or use a model that was trained on answers filled with "
                "end-of-text tokens",
                stacklevel=2,
            )
        self.silent = None


@dataclass
class LengthTrace:
    """What `DaedalLength` saw and did at each forward, a tensor (batch,) for each.

    Attributes:
        gen_length: width of the windows that the model was given.
        eos_confidence: see `eos_confidence`.
        inserted: position in the window of the mask that gave way to several, -1 for none.
    """

    gen_length: list[Tensor] = field(default_factory=list)
    eos_confidence: list[Tensor] = field(default_factory=list)
    inserted: list[Tensor] = field(default_factory=list)


def eos_confidence(logits: Tensor, start: int, gen_length: Tensor, eos_token_id: int, window: int) -> Tensor:
    """How sure the model is that windows end in end-of-text tokens: a number in [0, 1] for each row (batch,).

    From the end of a window to its start, the first `window` positions where end-of-text is the most likely token count
    with its probability, others not at all. Their sum is divided by `window`, even where there are fewer of them.

    Args:
        logits: (batch, time, vocabulary), also of tokens that are committed.
        start, gen_length: first column and widths (batch,) of the windows.
    """
    logits = logits[:, start:].float()
    inside = torch.arange(logits.shape[1], device=logits.device) < gen_length[:, None]
    ends = inside & (logits.argmax(-1) == eos_token_id)
    counted = ends & (ends.flip(1).cumsum(1).flip(1) <= window)
    p = (logits[..., eos_token_id] - logits.logsumexp(-1)).exp()
    return p.masked_fill(~counted, 0.0).sum(1) / window
