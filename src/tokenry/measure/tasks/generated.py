"""What tasks that generate text share: its probability under the plain model, its cost, and how a report shows it."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...decode.generation.output import DecodeOutput
from ...decode.generation.sequence import SequenceState
from ...models.kv_cache import cache_bytes
from ..cost import Meter

__all__ = ["continuation_logprobs", "generation_cost", "shown_tokens"]


def continuation_logprobs(model: PreTrainedModel, output: DecodeOutput) -> list[Tensor]:
    """Log-probability of every generated token under the plain model, one (new tokens,) tensor per row."""
    found = []
    for prompt, ids in zip(output.prompt_ids, output.new_ids):
        whole = torch.tensor([prompt + ids], device=model.device)
        with torch.no_grad():
            logits = model(whole[:, :-1], use_cache=False, logits_to_keep=len(ids)).logits[0].float()
        target = whole[0, -len(ids) :, None]
        found.append(logits.log_softmax(-1).gather(1, target).squeeze(1).cpu())
    return found


def generation_cost(output: DecodeOutput, row: int, meter: Meter) -> dict[str, float]:
    """The cost of one row; what a batch shares is divided by its rows, except the peak."""
    rows = len(output.new_ids)
    return {
        "seconds": meter.seconds / rows,
        "tokens": float(len(output.new_ids[row])),
        "forward_passes": output.forward_calls / rows,
        "tokens_processed": output.tokens_processed / rows,
        "peak_bytes": meter.peak_bytes,
        "cache_bytes": cache_bytes(output.past_key_values) / rows,
    }


def shown_tokens(output: DecodeOutput, number: int, row: SequenceState, logprobs: Tensor) -> dict[str, Any]:
    """`tokens` [[text, probability], ...] and `marks` (the repairs) for the report. `row` holds the decoded text."""
    starts = [*row.starts, len(row.text)]
    pieces = [row.text[a:z] for a, z in pairwise(starts)]
    marks = [
        {"index": e.index, "kind": e.kind, "rule": e.rule, "rejected": e.rejected_text}
        for e in output.events
        if e.row == number
    ]
    return {"tokens": [[t, round(math.exp(p), 4)] for t, p in zip(pieces, logprobs.tolist())], "marks": marks}
