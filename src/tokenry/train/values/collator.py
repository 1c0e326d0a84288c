"""Batches of episodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.batch import right_padded
from .episodes import Episode

__all__ = ["RectifierCollator"]


@dataclass
class RectifierCollator:
    """Right-pads episodes; longer ones lose the beginning of their prompt.

    Returns `input_ids`, `attention_mask` and `rewards` (batch, time).
    """

    pad_token_id: int
    max_length: int = 1024

    def __call__(self, episodes: Sequence[Episode]) -> dict[str, Tensor]:
        rows = [[*e["prompt_ids"], *e["continuation_ids"]][-self.max_length :] for e in episodes]
        ids, mask = right_padded(rows, self.pad_token_id)
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "rewards": torch.tensor([self._rewards(e, len(row), ids.shape[1]) for e, row in zip(episodes, rows)]),
        }

    @staticmethod
    def _rewards(episode: Episode, length: int, width: int) -> list[float]:
        """A number for each token; one reward for the whole comes with its last token."""
        given = episode["reward"] if isinstance(episode["reward"], list | tuple) else [episode["reward"]]
        given = [float(r) for r in given][-length:]
        return [0.0] * (length - len(given)) + given + [0.0] * (width - length)
