"""The blocks of a batch as a table (batch, length), and back into columns: rows may be at different blocks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .state import DiffusionState

__all__ = ["block_values", "in_columns"]


def block_values(values: Tensor, state: DiffusionState, length: int, fill: float | int | bool) -> Tensor:
    """What (batch, time) has in each row's block: (batch, length), with `fill` where a block is shorter."""
    columns = _block_columns(state, length)
    found = F.pad(values, (0, length), value=fill).gather(1, columns)
    return found.masked_fill(columns >= state.block_end[:, None], fill)


def in_columns(chosen: Tensor, state: DiffusionState) -> Tensor:
    """The positions of each row's block (batch, length) that are True, as columns (batch, time)."""
    length = chosen.shape[1]
    whole = F.pad(torch.zeros_like(state.present), (0, length))
    return whole.scatter(1, _block_columns(state, length), chosen)[:, :-length] & state.in_block


def _block_columns(state: DiffusionState, length: int) -> Tensor:
    return state.block_start[:, None] + torch.arange(length, device=state.x.device)
