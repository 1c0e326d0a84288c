"""A response with one of its tokens exchanged, and how probable chosen tokens of each such sequence are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...models.kv_cache import new_cache
from ...trace.trace import Trace

__all__ = ["chosen_logprobs", "variations"]


def variations(trace: Trace, kept: Sequence[int], candidates: int, most: int, least: float) -> Tensor:
    """(sequences, T) ids: the trace's own first, then each with another likely token in one of the places `kept`.

    Args:
        candidates: likely tokens of each place that are tried.
        most: how many of all these pairs count, beside one for each place.
        least: probability that a pair must exceed.
    """
    if not len(kept) or most == 0:
        return trace.ids[None]
    places = torch.as_tensor(kept)
    probability, tokens = trace.logits(places - 1).softmax(-1).topk(candidates)
    order = probability.flatten().argsort(descending=True, stable=True)
    order = order[probability.flatten()[order] > least][: most + len(kept)]
    where, token = places[order // candidates], tokens.flatten()[order]
    other = token != trace.ids[where]
    made = trace.ids.repeat(int(other.sum()) + 1, 1)
    made[torch.arange(1, len(made)), where[other]] = token[other]
    return made


@torch.no_grad()
def chosen_logprobs(model: PreTrainedModel, trace: Trace, ids: Tensor, places: Sequence[int]) -> Tensor:
    """(sequences, places) log-probability of the tokens there; what all sequences share is computed once.

    Args:
        ids: (sequences, T), the trace's own sequence among them.
    """
    wanted = torch.as_tensor(places)
    different = (ids != trace.ids).any(0).nonzero().flatten()
    first = int(different[0]) if len(different) else len(trace)
    found = trace.logprob[wanted].repeat(len(ids), 1)
    at_first = wanted == first
    if at_first.any():
        logprobs = trace.logits([first - 1]).log_softmax(-1)[0]
        found[:, at_first] = logprobs[ids[:, first]][:, None]
    later = wanted > first
    if later.any():
        logits = _suffix_logits(model, ids, first, wanted[later] - 1 - first)
        targets = ids[:, wanted[later]].to(logits.device)
        found[:, later] = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0].cpu()
    return found


def _suffix_logits(model: PreTrainedModel, ids: Tensor, first: int, rows: Tensor) -> Tensor:
    """(sequences, rows, vocab) logits of rows of what follows the first `first` tokens, which are all the same."""
    ids, cache = ids.to(model.device), new_cache(model)
    out = model(ids[:1, :first], past_key_values=cache, use_cache=True, logits_to_keep=1)
    out.past_key_values.batch_repeat_interleave(len(ids))
    rest = {"past_key_values": out.past_key_values, "use_cache": True, "logits_to_keep": rows.to(model.device)}
    return model(ids[:, first:], **rest).logits
