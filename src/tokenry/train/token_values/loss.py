"""The loss of the values of tokens."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from ...core.errors import InputError

__all__ = ["ValueLoss", "token_value_loss"]

ValueLoss = Literal["mse", "bce"]


def token_value_loss(logits: Tensor, labels: Tensor, loss: ValueLoss = "mse") -> Tensor:
    """Mean over labeled tokens of the squared error of sigmoid(logits), or of the cross-entropy to soft labels. Both
    are least where the value is the label.

    Args:
        logits, labels: (batch, time); labels in [0, 1], NaN where there is none.

    Raises:
        InputError: no label at all.
    """
    known = ~labels.isnan()
    if not bool(known.any()):
        raise InputError("no token of the batch has a label; give longer rows, or a lower min_prefix_count")
    found, wanted = logits[known].float(), labels[known].float()
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(found, wanted)
    return F.mse_loss(found.sigmoid(), wanted)
