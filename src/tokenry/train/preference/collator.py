"""Batches of preference pairs, and the logits at the end of their contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...core.errors import InputError
from ...models.batch import left_padded, position_ids, right_padded
from .pairs import Pair

__all__ = ["FTPOCollator", "last_logits"]


@dataclass
class FTPOCollator:
    """Left-pads the contexts of pairs; longer ones keep their right end.

    Returns `input_ids`, `attention_mask`, `position_ids` (batch, time), `chosen_ids`, `chosen_mask` (batch, chosen)
    and `rejected_ids` (batch,).
    """

    pad_token_id: int
    max_length: int = 2048
    truncate: bool = True

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        longest = max(len(pair["prompt_ids"]) for pair in pairs)
        if longest > self.max_length and not self.truncate:
            raise InputError(f"a context has {longest} tokens, max_length is {self.max_length}; raise it or truncate")
        contexts = [pair["prompt_ids"][-self.max_length :] for pair in pairs]
        ids, mask = left_padded(contexts, pad=self.pad_token_id)
        chosen_ids, chosen_mask = right_padded([pair["chosen_ids"] for pair in pairs], self.pad_token_id)
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "position_ids": position_ids(mask),
            "chosen_ids": chosen_ids,
            "chosen_mask": chosen_mask,
            "rejected_ids": torch.tensor([pair["rejected_id"] for pair in pairs]),
        }


CONTEXT = ("input_ids", "attention_mask", "position_ids")


def last_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits (batch, vocab) after the last token of left-padded contexts."""
    return model(**{name: batch[name] for name in CONTEXT}, logits_to_keep=1, use_cache=False).logits[:, -1]
