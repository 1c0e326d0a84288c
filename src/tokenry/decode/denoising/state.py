"""The state of masked-diffusion sampling: what is committed, where the block of each row is, and how columns move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.errors import InputError
from ...core.fields import Tokens, check
from ...models.positions import context_window
from ..generation.sampler import row_seed

__all__ = ["FRESH", "DiffusionState", "Edit", "Prediction"]

FRESH = -1  # in a source index: a new mask, not a column that was there
WHOLE = 2**31  # a block that no window outgrows


class Prediction(NamedTuple):
    """What one step predicts, for every column.

    Attributes:
        logits: (batch, time, vocabulary) after all transforms.
        tokens: (batch, time) the most likely token, or a drawn one.
        confidence: (batch, time) its probability under these logits, before any temperature.
    """

    logits: Tensor
    tokens: Tensor
    confidence: Tensor


# --- moving columns ------------------------------------------------------------------------------------------------


class Edit(NamedTuple):
    """How columns move: column j of the new state is column `source_index[:, j]` of the old one.

    Attributes:
        source_index: (batch, new time) int64; FRESH is a new mask.
        gen_length: (batch,) the new width of each window. Columns after it are padding.
    """

    source_index: Tensor
    gen_length: Tensor

    def take(self, values: Tensor, fresh: float | int | bool) -> Tensor:
        """`values` (batch, time, ...) in the new order, with `fresh` in new columns."""
        index = self.source_index.clamp(min=0)
        index = index.reshape(*index.shape, *[1] * (values.ndim - 2)).expand(-1, -1, *values.shape[2:])
        new = (self.source_index == FRESH).reshape(*self.source_index.shape, *[1] * (values.ndim - 2))
        return values.gather(1, index).masked_fill(new, fresh)

    @property
    def first_change(self) -> Tensor:
        """(batch,) the first column that is not what it was; the new width if all are. Padding does not count."""
        width = self.source_index.shape[1]
        columns = torch.arange(width, device=self.source_index.device)
        padding = columns >= (width - self.gen_length.max() + self.gen_length)[:, None]
        moved = (self.source_index != columns) & ~padding
        return torch.where(moved.any(1), moved.long().argmax(1), width)

    def after(self, start: int) -> Edit:
        """The same for values that begin at column `start`, before which nothing moves."""
        source = self.source_index[:, start:]
        return Edit(torch.where(source == FRESH, FRESH, source - start), self.gen_length)

    @classmethod
    def resize(cls, state: DiffusionState, gen_length: Tensor) -> Edit:
        """Windows of these widths (batch,): cut at the end, or with new masks there."""
        return cls.insert(state, torch.full_like(gen_length, FRESH), 1, gen_length)

    @classmethod
    def insert(cls, state: DiffusionState, column: Tensor, count: int, gen_length: Tensor) -> Edit:
        """Replace one column of each row by `count` new masks, later ones moving to the right.

        Args:
            column: (batch,), FRESH for a row without insertion.
            gen_length: (batch,) the widths afterwards; what does not fit is cut off, what is missing are new masks.
        """
        width = state.start + int(gen_length.max())
        new = torch.arange(width, device=column.device).expand(len(column), -1)
        at = torch.where(column == FRESH, width, column)[:, None]
        source = torch.where(new < at, new, torch.where(new < at + count, FRESH, new - (count - 1)))
        inside = source < state.start + state.gen_length[:, None]
        kept = new < state.start + gen_length[:, None]
        return cls(torch.where(inside & kept, source, FRESH), gen_length)


# --- random numbers ------------------------------------------------------------------------------------------------


class RowGenerators:
    """Where each row's random numbers come from: with a seed, a generator for each row, that of `row_seed`; without
    one, torch's own for all rows."""

    def __init__(self, seed: int | None, batch: int, device: torch.device) -> None:
        self.rows: list[torch.Generator | None] = [None] * batch
        if seed is not None:
            self.rows = [torch.Generator(device).manual_seed(row_seed(seed, row)) for row in range(batch)]


# --- the state -----------------------------------------------------------------------------------------------------


@dataclass
class DiffusionState:
    """All rows of a generation. A window begins at column `start` in every row, since prompts are padded on the left.

    A row that is not `working` has finished its block: it waits for the others, or is done. Nothing may happen to it,
    and nothing be drawn for it, that would not happen if it were alone.

    Attributes:
        x: ids (batch, time).
        present: what is no padding (batch, time), bool.
        start: the first column of all windows.
        gen_length: (batch,) widths of the windows.
        block_length: width of a block.
        block_start: (batch,) first column of the row's block.
        block_step: (batch,) steps that the row has taken in its block.
        nfe, tokens_processed: (batch,) and forward_calls: see `DiffusionStats`.
        commit_step, commit_confidence: (batch, time), see `DiffusionStats`; -1 and 0 where nothing is committed.
        mask_token_id: what a mask is.
        generators: where all that is drawn in this generation comes from, tokens and positions alike.
    """

    x: Tensor
    present: Tensor
    start: int
    gen_length: Tensor
    block_length: int
    block_start: Tensor
    block_step: Tensor
    nfe: Tensor
    tokens_processed: Tensor
    commit_step: Tensor
    commit_confidence: Tensor
    mask_token_id: int
    pad_token_id: int
    generators: RowGenerators
    context: int | None = None
    forward_calls: int = 0

    @classmethod
    def begin(
        cls,
        model: Any,
        prompts: Tensor,
        present: Tensor,
        gen_length: int,
        block_length: int | None,
        seed: int | None = None,
    ) -> DiffusionState:
        """Prompts (batch, time), each followed by a window of masks for a `MaskedDiffusionModel`.

        Raises:
            InputError: a length below 1, or a window beyond the model's context.
        """
        block_length = WHOLE if block_length is None else block_length
        if gen_length < 1 or block_length < 1:
            raise InputError(
                f"gen_length={gen_length} and block_length={block_length} are not allowed; give numbers >= 1"
            )
        check("gen_length", gen_length, Tokens)
        batch, start = prompts.shape
        device = prompts.device
        window = torch.full((batch, gen_length), model.mask_token_id, device=device)
        shape = (batch, start + gen_length)
        zeros = torch.zeros(batch, dtype=torch.long, device=device)
        state = cls(
            x=torch.cat([prompts, window], 1),
            present=torch.cat([present, torch.ones_like(window, dtype=torch.bool)], 1),
            start=start,
            gen_length=zeros + gen_length,
            block_length=block_length,
            block_start=zeros + start,
            block_step=zeros.clone(),
            nfe=zeros.clone(),
            tokens_processed=zeros.clone(),
            commit_step=torch.full(shape, -1, device=device),
            commit_confidence=torch.zeros(shape, device=device),
            mask_token_id=model.mask_token_id,
            pad_token_id=model.pad_token_id or 0,
            generators=RowGenerators(seed, batch, device),
            context=context_window(model.model),
        )
        state.check_context()
        return state

    def check_context(self) -> None:
        """Refuse rows that are longer than the model's context."""
        longest = int(self.present.sum(1).max())
        if self.context is not None and longest > self.context:
            raise InputError(
                f"prompt and window have {longest} tokens, the model's context window {self.context}; shorten one"
            )

    # --- where things are ------------------------------------------------------------------------------------------

    @property
    def columns(self) -> Tensor:
        """(1, time) the number of each column."""
        return torch.arange(self.x.shape[1], device=self.x.device)[None]

    @property
    def end(self) -> Tensor:
        """(batch,) the column after each window."""
        return self.start + self.gen_length

    @property
    def block_end(self) -> Tensor:
        """(batch,) the column after the row's block."""
        return torch.minimum(self.block_start + self.block_length, self.end)

    @property
    def in_window(self) -> Tensor:
        """(batch, time) the columns of the windows."""
        return (self.columns >= self.start) & (self.columns < self.end[:, None])

    @property
    def in_block(self) -> Tensor:
        """(batch, time) the columns of each row's block."""
        return (self.columns >= self.block_start[:, None]) & (self.columns < self.block_end[:, None])

    @property
    def masked(self) -> Tensor:
        """(batch, time) what is still to be committed."""
        return (self.x == self.mask_token_id) & self.in_window

    @property
    def candidates(self) -> Tensor:
        """(batch, time) the masks of each row's block: what may be committed now."""
        return self.masked & self.in_block

    @property
    def active(self) -> Tensor:
        """(batch,) rows with masks."""
        return self.masked.any(1)

    @property
    def working(self) -> Tensor:
        """(batch,) rows with masks in their block; the others are done, or wait for the batch."""
        return self.candidates.any(1)

    def uniform(self) -> Tensor:
        """(batch, time) drawn numbers in [0, 1) for the windows of the rows that work, 0 elsewhere."""
        values = torch.zeros(self.x.shape, device=self.x.device)
        for row in self.working.nonzero().flatten().tolist():
            end = int(self.end[row])
            values[row, self.start : end] = torch.rand(
                end - self.start, generator=self.generators.rows[row], device=values.device
            )
        return values

    # --- what changes it -------------------------------------------------------------------------------------------

    def count(self, first: Tensor | int, last: Tensor | int, rows: Tensor, calls: int = 1) -> None:
        """One forward of these rows (batch,) over each one's columns [first, last), in `calls` of the model."""
        fed = (self.columns >= _column(first)) & (self.columns < _column(last)) & self.present
        self.forward_calls += calls
        self.nfe = self.nfe + rows
        self.tokens_processed = self.tokens_processed + fed.sum(1) * rows

    def commit(self, prediction: Prediction, commit: Tensor) -> None:
        """Write the chosen predictions (batch, time)."""
        self.block_step = self.block_step + self.working
        self.x = torch.where(commit, prediction.tokens, self.x)
        self.commit_step = torch.where(commit, self.nfe[:, None], self.commit_step)
        self.commit_confidence = torch.where(commit, prediction.confidence, self.commit_confidence)

    def write(self, columns: Tensor, token: int) -> None:
        """Commit a token without a prediction, as length policies do, at the columns (batch, time) that are True."""
        self.x = self.x.masked_fill(columns, token)
        self.commit_step = self.commit_step.masked_fill(columns, 0)

    def apply(self, edit: Edit) -> None:
        """Move the columns. The prompt must stay where it is.

        Raises:
            InputError: a change of the prompt, a window without tokens or beyond the model's context.
        """
        if bool((edit.first_change < self.start).any()):
            raise InputError("an edit changes the prompt; only windows can be edited")
        if bool((edit.gen_length < 1).any()):
            raise InputError("an edit leaves a window without tokens; keep at least one")
        self.x = edit.take(self.x, self.mask_token_id)
        self.commit_step, self.commit_confidence = edit.take(self.commit_step, -1), edit.take(self.commit_confidence, 0)
        self.gen_length = edit.gen_length
        prompt = self.present[:, : self.start]
        self.present = self.in_window
        self.present[:, : self.start] = prompt
        after = self.columns >= self.end[:, None]
        self.x = self.x.masked_fill(after, self.pad_token_id)
        self.check_context()

    def advance(self, together: bool = False) -> None:
        """Rows whose block has no mask go to the next block that has one; all at once, or none, with `together`."""
        while True:
            done = ~self.working
            if together:
                done = done.all().expand_as(done)
            moving = done & (self.block_end < self.end)
            if not bool(moving.any()):
                return
            self.block_start = torch.where(moving, self.block_start + self.block_length, self.block_start)
            self.block_step = self.block_step.masked_fill(moving, 0)


def _column(number: Tensor | int) -> Tensor | int:
    """A number for each row, beside the columns of the row."""
    return number[:, None] if isinstance(number, Tensor) else number
