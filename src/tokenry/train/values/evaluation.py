"""How well the risk that a rectifier sees foretells what is still to come."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...learned.dead_end_values import DeadEndValueModel
from .collator import RectifierCollator
from .episodes import Episode

__all__ = ["risk_errors"]


@torch.no_grad()
def risk_errors(
    model: DeadEndValueModel, episodes: Sequence[Episode], collator: RectifierCollator, batch_size: int = 64
) -> Tensor:
    """What is still to come after the prompt and the risk seen there, then the squared errors of the risk at the first,
    middle and last continuation token: (episodes, 5)."""
    found = []
    for start in range(0, len(episodes), batch_size):
        part = episodes[start : start + batch_size]
        batch = {name: value.to(model.device) for name, value in collator(part).items()}
        q = model(batch["input_ids"], batch["attention_mask"]).q[:, :-1]
        risk = -q.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1).clamp(-1, 0)
        to_come = -batch["rewards"].flip(1).cumsum(1).flip(1)[:, 1:]
        last = batch["attention_mask"].sum(1) - 2  # the transition to the last token
        lengths = torch.tensor([len(e["continuation_ids"]) for e in part], device=last.device)
        first = (last + 1 - lengths).clamp_min(0)
        places = torch.stack([first, (first + last + 1) // 2, last], 1)
        risk, to_come = risk.gather(1, places), to_come.gather(1, places)
        found.append(torch.cat([to_come[:, :1], risk[:, :1], (risk - to_come) ** 2], 1))
    return torch.cat(found)
