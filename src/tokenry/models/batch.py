"""Lists of token ids, one for each row of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["left_padded", "shared_length"]


def left_padded(rows: Sequence[Sequence[int]], device: torch.device, pad: int = 0) -> tuple[Tensor, Tensor]:
    """One block (rows, width) with padding on the left, and where it is none (rows, width), bool."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    return ids, torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device)


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(i for i in range(shorter) if first[i] != second[i])
