"""The loss of a filter of confidences, and what a filter is worth."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...learned.confidence_filter import ConfidenceFilter, TraceDataset

__all__ = ["filter_loss", "filter_report"]

BINS = 10  # of probabilities, in the calibration error


def filter_loss(made: ConfidenceFilter, traces: TraceDataset, mask_loss: bool = False) -> Tensor:
    """Mean binary cross-entropy over positions; with `mask_loss` over those that were masked."""
    losses = F.binary_cross_entropy_with_logits(made(traces.conf), traces.label.float(), reduction="none")
    return losses[traces.mask].mean() if mask_loss else losses.mean()


@torch.no_grad()
def filter_report(
    made: ConfidenceFilter, traces: TraceDataset, accept_threshold: float = 0.96, mask_loss: bool = False
) -> dict[str, float]:
    """What a filter is worth on traces, at the positions that were masked.

    Returns:
        loss: see `filter_loss`.
        false_positives: share of the accepted predictions that are not final.
        false_negatives: share of the final predictions that are not accepted.
        calibration: mean distance of the predicted probability from the share that is final, over ten bins (ECE).
        accepted: share of the predictions that are accepted.
    """
    probability, final = made(traces.conf).sigmoid()[traces.mask], traces.label[traces.mask]
    accepted = probability > accept_threshold
    bins = (probability * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS).index_add(0, bins, probability - final.float())
    return {
        "loss": float(filter_loss(made, traces, mask_loss)),
        "false_positives": _share(accepted & ~final, accepted),
        "false_negatives": _share(final & ~accepted, final),
        "calibration": float(gaps.abs().sum() / len(final)),
        "accepted": _share(accepted, torch.ones_like(accepted)),
    }


def _share(part: Tensor, whole: Tensor) -> float:
    return int(part.sum()) / max(1, int(whole.sum()))
