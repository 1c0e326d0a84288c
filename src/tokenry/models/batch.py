"""Lists of token ids, one for each row of a batch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["left_padded", "position_arguments", "position_ids", "right_padded", "shared_length"]


def left_padded(
    rows: Sequence[Sequence[int]], device: torch.device | str = "cpu", pad: int = 0
) -> tuple[Tensor, Tensor]:
    """One block (rows, width) with padding on the left, and where it is none (rows, width), bool."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    return ids, torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)


def right_padded(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """One block (rows, width) with padding on the right, and where it is none (rows, width), bool."""
    width = max(map(len, rows))
    ids = torch.tensor([list(row) + [pad] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])


def position_ids(mask: Tensor) -> Tensor:
    """The place (rows, width) of each token in its own row, counted from 0; 0 at padding on the left, too."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def position_arguments(module: nn.Module, mask: Tensor) -> dict[str, Tensor]:
    """`position_ids` for a forward of padded rows, if it takes them: learned ones must not count padding."""
    takes = "position_ids" in inspect.signature(module.forward).parameters
    return {"position_ids": position_ids(mask)} if takes else {}


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i in range(shorter) if first[i] != second[i])
