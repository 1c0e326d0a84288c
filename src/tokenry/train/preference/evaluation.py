"""What a model does at the contexts of preference pairs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .collator import FTPOCollator, last_logits
from .losses import others, target_ids
from .pairs import Pair

__all__ = ["score_pairs"]


@torch.no_grad()
def score_pairs(
    model: nn.Module, pairs: Sequence[Pair], collator: FTPOCollator, batch_size: int = 16, reference: bool = True
) -> dict[str, Tensor]:
    """What a model does at each context; the columns have the shape (pairs,).

    Returns:
        `choice_win` (share of chosen tokens above the rejected one), `rejected` and `chosen` (probability of the
        rejected token, and of all chosen ones together) and, for a model with an adapter, `drift` (mean absolute
        change of the other logits).
    """
    columns: dict[str, list[Tensor]] = defaultdict(list)
    device = next(model.parameters()).device
    training, adapter = model.training, reference and hasattr(model, "disable_adapter")
    model.eval()
    for start in range(0, len(pairs), batch_size):
        batch = {k: v.to(device) for k, v in collator(pairs[start : start + batch_size]).items()}
        logits = last_logits(model, batch).float()
        chosen, mask, rejected = batch["chosen_ids"], batch["chosen_mask"], batch["rejected_ids"][:, None]
        wins = (logits.gather(1, chosen) > logits.gather(1, rejected)) & mask
        probability = logits.softmax(-1)
        columns["choice_win"].append(wins.sum(1) / mask.sum(1))
        columns["rejected"].append(probability.gather(1, rejected)[:, 0])
        columns["chosen"].append((probability.gather(1, chosen) * mask).sum(1))
        if adapter:
            with model.disable_adapter():
                drift = (logits - last_logits(model, batch).float()).abs()
            outside = others(drift, target_ids(chosen, mask, batch["rejected_ids"]))
            columns["drift"].append((drift * outside).sum(1) / outside.sum(1))
    model.train(training)
    return {name: torch.cat(parts).cpu() for name, parts in columns.items()}
