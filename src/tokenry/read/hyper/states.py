"""The states of the second half of the layers at one token, and their compression to one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.progress import Progress
from ...hooks.last_states import last_states
from ...models.anatomy import decoder_layers
from ...models.batch import left_padded, pad_id
from ...models.positions import check_prompt_fits
from ...trace.trace import Trace

__all__ = ["compress_states", "read_states", "trace_states"]

ROUNDS = 1000  # of k-means, at most
SEED = 101  # of its first centroids


def compress_states(hidden: Tensor, n_clusters: int = 5, normalize: bool = False, seed: int = SEED) -> Tensor:
    """The sum (..., width) of the centroids of k-means over the layers of `hidden` (..., layers, width), float32.

    Begins with `n_clusters` layers that the seed draws; a cluster that is empty keeps its centroid.

    Args:
        n_clusters: 0 for the mean over the layers instead.
        normalize: give the state of every layer the same root mean square, 1, before.

    Raises:
        InputError: more clusters than layers, states that are not finite.
    """
    points = hidden.float()
    layers = points.shape[-2] if points.dim() > 1 else 0
    if not 0 <= n_clusters <= layers:
        raise InputError(
            f"n_clusters={n_clusters} is not allowed; give a whole number in [0, {layers}], the layers taken"
        )
    if not bool(points.isfinite().all()):
        raise InputError("a hidden state is not finite; give states without nan and inf")
    if normalize:
        points = points / points.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
    if n_clusters == 0:
        return points.mean(-2)
    flat = points.flatten(0, -3) if points.dim() > 2 else points[None]
    return _centroids(flat, n_clusters, seed).sum(1).reshape(points.shape[:-2] + points.shape[-1:])


def _centroids(points: Tensor, k: int, seed: int) -> Tensor:
    """Centroids (rows, k, width) of points (rows, layers, width), each row on its own."""
    start = torch.randperm(points.shape[1], generator=torch.Generator().manual_seed(seed))[:k]
    centroids = points[:, start]
    for _ in range(ROUNDS):
        member = torch.nn.functional.one_hot(torch.cdist(points, centroids).argmin(-1), k).float()
        counts = member.sum(1)[..., None]
        means = member.transpose(1, 2) @ points / counts.clamp(min=1)
        moved = torch.where(counts > 0, means, centroids)
        if torch.allclose(moved, centroids):
            return moved
        centroids = moved
    return centroids


@torch.no_grad()
def read_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Tensor:
    """Hidden states L//2 .. L (texts, layers, width) at the last token of every text, the last one after the norm."""
    texts = [texts] if isinstance(texts, str) else texts
    rows = tokenizer(list(texts))["input_ids"] if texts else []
    if not rows or not all(rows):
        raise InputError("there is no text to read; give at least one, each with some text")
    check_prompt_fits(model, max(map(len, rows)))
    depth, parts = len(decoder_layers(model)), []
    for start in range(0, len(rows), batch_size):
        ids, mask = left_padded(rows[start : start + batch_size], model.device, pad_id(tokenizer))
        parts.append(last_states(model, ids, mask, range(max(1, depth // 2), depth + 1)).float().cpu())
        if progress is not None:
            progress(min(start + batch_size, len(rows)), len(rows))
    return torch.cat(parts)


def trace_states(trace: Trace, position: int) -> Tensor:
    """The same states (layers, width) at a token of a trace.

    Raises:
        InputError: a trace without them; it says which.
    """
    depth = trace.header["depth"]
    wanted = list(range(max(1, depth // 2), depth))
    missing = [layer for layer in wanted if f"resid.{layer}" not in trace.tensors]
    if missing:
        raise InputError(
            f"this trace does not hold the hidden states {', '.join(map(str, missing))}; capture again with "
            f"hidden=range({wanted[0]}, {depth})"
        )
    if not -len(trace) <= position < len(trace):
        raise InputError(f"position={position} is not allowed; this trace has tokens {-len(trace)} to {len(trace) - 1}")
    return torch.stack(
        [*(trace.hidden(layer)[position].float() for layer in wanted), trace.hidden("final")[position].float()]
    )
