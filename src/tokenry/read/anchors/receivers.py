"""Receiver heads: heads whose attention from afar is gathered on few sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import InputError
from ...trace.reducers import SentenceMean
from ...trace.trace import Trace
from .sentences import at_least, sentences_of

__all__ = ["ReceiverHeads", "receiver_heads", "receiver_scores", "sentence_attention", "vertical_scores"]

Head = tuple[int, int]
ROWS = 128  # attention rows rebuilt at a time


@dataclass(frozen=True)
class ReceiverHeads:
    """The heads, best first, as (layer, head), and what they were chosen by.

    Attributes:
        by_trace: (traces, layers, heads) excess kurtosis over sentences; NaN where a head looks at all alike.
    """

    heads: list[Head]
    by_trace: Tensor

    @property
    def kurtosis(self) -> Tensor:
        """(layers, heads), mean over the traces."""
        return self.by_trace.nanmean(0)

    @property
    def reliability(self) -> float:
        """Correlation over heads, without layer 0, of the kurtosis in every other trace with that in the rest.

        Raises:
            InputError: there is one trace.
        """
        if len(self.by_trace) < 2:
            raise InputError("one trace has no two halves; give at least 2 traces")
        halves = torch.stack([self.by_trace[i::2, 1:].nanmean(0).flatten() for i in (0, 1)])
        return float(torch.corrcoef(halves[:, halves.isfinite().all(0)])[0, 1])


def sentence_attention(trace: Trace) -> Tensor:
    """Mean attention from the tokens of one sentence to those of another, (layers, heads, n, n) in float32.

    Raises:
        InputError: the trace holds neither what `SentenceMean` of its sentences gives nor queries and keys.
    """
    spans = [(s.start, s.stop) for s in sentences_of(trace)]
    depth = trace.header["depth"]
    if all(f"q.{layer}" in trace.tensors for layer in range(depth)):
        return _rebuilt(trace, spans, depth)
    maps = trace.reduced.get("sentence_mean")
    if maps is None:
        raise InputError(
            'this trace does not hold attention between sentences; capture again with qk="all" or '
            "reducers=[SentenceMean(spans)]"
        )
    if maps.shape[-1] != len(spans):
        raise InputError(
            f"this trace holds attention between {maps.shape[-1]} spans and has {len(spans)} sentences; capture again "
            "with reducers=[SentenceMean(spans)] of segment_sentences"
        )
    return maps


def _rebuilt(trace: Trace, spans: list[tuple[int, int]], depth: int) -> Tensor:
    """The same from queries and keys, some rows at a time."""
    mean = SentenceMean(spans)
    for layer in range(depth):
        for first in range(0, len(trace), ROWS):
            mean.update(layer, first, 0, trace.attention(layer, rows=slice(first, first + ROWS)))
    return mean.result()["sentence_mean"]


def vertical_scores(maps: Tensor, proximity: int = 4, control_depth: bool = False) -> Tensor:
    """Mean attention that each sentence gets from those `proximity` or more after it, (..., n), NaN for the last ones.

    Args:
        maps: (..., n, n), see `sentence_attention`.
        control_depth: put ranks among those that a sentence can look back at, divided by their number, in the place of
            attention, so that late sentences, which spread it over more, count alike.
    """
    n = maps.shape[-1]
    far = torch.arange(n)[:, None] - torch.arange(n) >= proximity
    if control_depth:
        maps = _ranks(maps, far)
    return torch.where(far, maps, torch.nan).nanmean(-2)


def _ranks(maps: Tensor, far: Tensor) -> Tensor:
    """Average ranks within the far entries of each row, divided by how many there are."""
    ranks = torch.zeros_like(maps)
    for row in range(len(far)):
        values = maps[..., row, far[row]]
        if values.shape[-1]:
            below = (values[..., None, :] < values[..., None]).sum(-1)
            equal = (values[..., None, :] == values[..., None]).sum(-1)
            ranks[..., row, far[row]] = (below + (equal + 1) / 2) / values.shape[-1]
    return ranks


def kurtosis(values: Tensor) -> Tensor:
    """Excess kurtosis m4 / m2^2 - 3 with biased moments over the last axis, without NaN."""
    values = values.double()
    centered = values - values.nanmean(-1, keepdim=True)
    return (centered**4).nanmean(-1) / (centered**2).nanmean(-1) ** 2 - 3


def receiver_heads(
    traces: Sequence[Trace], top_k: int = 20, proximity: int = 4, control_depth: bool = False
) -> ReceiverHeads:
    """The heads, not of layer 0, whose vertical scores have the highest kurtosis, on average over traces.

    Raises:
        InputError: no traces, one with too few sentences or without attention, or more heads than there are.
    """
    if not traces:
        raise InputError("there are 0 traces; give at least 1")
    found = []
    for trace in traces:
        at_least(sentences_of(trace), proximity)
        found.append(kurtosis(vertical_scores(sentence_attention(trace), proximity, control_depth)))
    by_trace = torch.stack(found)
    layers, heads = by_trace.shape[1:]
    if not 1 <= top_k <= (layers - 1) * heads:
        raise InputError(
            f"top_k={top_k} is not allowed; behind layer 0 this model has {(layers - 1) * heads} heads, give 1 to that"
        )
    mean = by_trace.nanmean(0)[1:].nan_to_num(-torch.inf).flatten()
    best = mean.argsort(descending=True, stable=True)[:top_k].tolist()
    return ReceiverHeads([(1 + i // heads, i % heads) for i in best], by_trace)


def receiver_scores(
    trace: Trace, heads: ReceiverHeads | Sequence[Head], proximity: int = 4, control_depth: bool = False
) -> Tensor:
    """Mean vertical score (n,) of each sentence over heads; NaN for the last `proximity` ones.

    Raises:
        InputError: too few sentences, no attention in the trace, or a head that does not exist.
    """
    at_least(sentences_of(trace), proximity)
    maps = sentence_attention(trace)
    chosen = list(heads.heads if isinstance(heads, ReceiverHeads) else heads)
    for layer, head in chosen:
        if not (0 <= layer < maps.shape[0] and 0 <= head < maps.shape[1]):
            raise InputError(
                f"the head ({layer}, {head}) does not exist; layers are 0 to {maps.shape[0] - 1}, heads 0 to "
                f"{maps.shape[1] - 1}"
            )
    if not chosen:
        raise InputError("there are 0 heads; give at least 1 as (layer, head)")
    layer, head = torch.tensor(chosen).T
    return vertical_scores(maps[layer, head], proximity, control_depth).mean(0)
