"""What is kept: a map of cache entries by layer and head, and what a scorer sees and gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ...models.batch import position_ids

__all__ = ["KeepMap", "LayerView", "TokenScorer"]


# --- what was kept ---------------------------------------------------------------------------------------------


@dataclass
class KeepMap:
    """Which columns of the prompt each layer kept.

    Attributes:
        length: T, columns of the prompt, left padding included.
        valid: (batch, T) bool, False on padding; None without padding.
        columns: per layer (batch, kept) int64, ascending. Layers that are never cut are missing.
        scores: per layer (batch, T) float32, -inf on padding; only layers that were cut.
        column_bytes: per layer, bytes of one column of one row, keys and values.
    """

    length: int
    valid: Tensor | None = None
    columns: dict[int, Tensor] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    column_bytes: dict[int, int] = field(default_factory=dict)

    @property
    def cut(self) -> bool:
        """Whether any layer lost a column."""
        return bool(self.scores)

    def counts(self) -> dict[int, int]:
        """Columns kept, per layer."""
        return {layer: columns.shape[1] for layer, columns in self.columns.items()}

    def mask(self, layer: int) -> Tensor:
        """(batch, T) bool: True where a token of the prompt is still there. Padding is False."""
        columns = self.columns[layer]
        kept = torch.zeros(columns.shape[0], self.length, dtype=torch.bool, device=columns.device)
        kept.scatter_(1, columns, True)
        return kept if self.valid is None else kept & self.valid

    def positions(self, layer: int) -> Tensor:
        """(batch, kept): the place of each kept column in its own row's prompt; -1 for padding."""
        columns = self.columns[layer]
        if self.valid is None:
            return columns
        place = position_ids(self.valid).masked_fill(~self.valid, -1)
        return place.gather(1, columns)

    def kv_bytes(self) -> int:
        """Bytes of the kept keys and values of the prompt, over all layers that may be cut."""
        return sum(c.numel() * self.column_bytes[layer] for layer, c in self.columns.items())


# --- scorers ---------------------------------------------------------------------------------------------------


@dataclass
class LayerView:
    """One layer right after prefill, as a scorer sees it.

    `keys` and `values` are (batch, kv_heads, T, head_dim); `valid` is (batch, T) bool or None without padding.
    `attention(w, heads)` gives the attention rows of the last w positions, (batch, len(heads), w, T), in float32.
    """

    layer: int
    keys: Tensor
    values: Tensor
    valid: Tensor | None
    attention: Callable[[int, Sequence[int]], Tensor]

    def places(self) -> Tensor:
        """(batch, T): the place of each column in its own row, 0 for the first token after the padding."""
        batch, _, length, _ = self.keys.shape
        if self.valid is None:
            return torch.arange(length, device=self.keys.device).expand(batch, length)
        return position_ids(self.valid)


class TokenScorer(Protocol):
    """Says what each token of the prompt is worth to one layer. `reads_attention`: whether it asks for rows."""

    reads_attention: bool

    def score(self, view: LayerView) -> Tensor:
        """(batch, T), higher is kept first."""
