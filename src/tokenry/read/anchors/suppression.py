"""Suppression: what hiding a sentence from all that comes after it does to the next-token distributions there.

What comes before the end of a sentence does not change, so it is computed once and kept as a cache. From there on
several sentences, each hidden in a row of its own, run as one batch.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...core.errors import InputError
from ...core.fields import require
from ...hooks.attention import suppress
from ...models.anatomy import attention_modules, decoder_body, decoder_layers
from ...models.kv_cache import new_cache
from ...text.sentences import check_spans
from ...text.spans import Span
from ...trace.recorder import head_logits
from ...trace.trace import Trace
from .sentences import sentences_of

__all__ = ["suppressed_kl", "suppression_matrix"]

TOKENS = 2048  # fed at a time, rows times length, so that memory stays that of a plain forward
LOGITS = 2**22  # elements of a chunk of logits
FLOOR = 1e-9  # added to a divergence before its logarithm
Align = Literal["position", "token"]


def suppression_matrix(
    model: PreTrainedModel,
    trace: Trace,
    heads: Sequence[tuple[int, int]] | None = None,
    layers: Collection[int] | None = None,
    log: bool = True,
    center: bool = True,
    temperature: float = 0.6,
    align: Align = "position",
) -> Tensor:
    """What hiding sentence i does to sentence j, (n, n) as [j, i], NaN unless i < j.

    The mean over the tokens of j of ln(KL + 1e-9), where KL is the divergence in nats of the suppressed from the plain
    next-token distribution.

    Args:
        heads: the only (layer, head) in which sentences are hidden; default: all.
        layers: the only layers in which they are; none hides nothing.
        log: whether the logarithm is taken.
        center: whether the mean over i of each row is taken off, so that it does not count that j is easy to disturb.
        temperature: of both distributions.
        align: "position" takes the distributions after the tokens of j, as the authors do; "token" those from which
            the tokens of j were drawn, without such that lie in sentence i and cannot change.

    Raises:
        InputError: a trace of another model or of one sentence; a head, layer or temperature that cannot be.
    """
    trace.check_model(model)
    spans = [(s.start, s.stop) for s in sentences_of(trace)]
    if len(spans) < 2:
        raise InputError(f"there are {len(spans)} sentences; suppression needs at least 2")
    effects = suppressed_kl(model, trace.ids, spans, heads, layers, temperature)
    effects = (effects + FLOOR).log() if log else effects
    matrix = torch.full((len(spans), len(spans)), torch.nan)
    back = 1 if align == "token" else 0
    for j, (start, stop) in enumerate(spans):
        for i in range(j):
            matrix[j, i] = effects[i, max(start - back, spans[i][1]) : stop - back].mean()
    return matrix - matrix.nanmean(1, keepdim=True) if center else matrix


@torch.no_grad()
def suppressed_kl(
    model: PreTrainedModel,
    ids: Tensor,
    spans: Sequence[Span],
    heads: Sequence[tuple[int, int]] | None = None,
    layers: Collection[int] | None = None,
    temperature: float = 0.6,
) -> Tensor:
    """KL(plain || suppressed) in nats (spans, T) after each token; 0 up to the end of the span, where nothing changes.

    Args:
        ids: (T,) the tokens.
        spans: half-open token ranges in order, without overlap.
        heads, layers: see `suppression_matrix`.

    Raises:
        InputError: spans, heads, layers or a temperature that cannot be; a model that is not all attention.
    """
    require(temperature > 0, "temperature", temperature, "a number above 0")
    check_spans(spans, len(ids))
    hidden_in = _hidden_in(model, heads, layers)
    tokens = ids.to(model.device)[None]
    plain = _body(model, tokens, None)[0]
    cache, filled = _empty(model), 0
    found = torch.zeros(len(spans), len(ids))
    for group in _groups(spans, len(ids)):
        start = spans[group[0]][1]
        _body(model, tokens[:, filled:start], cache)
        filled = start
        if start == len(ids):
            break
        rows = copy.deepcopy(cache)
        rows.batch_repeat_interleave(len(group))
        with _hidden(model, [spans[i] for i in group], hidden_in):
            states = _body(model, tokens[:, start:].expand(len(group), -1), rows)
        del rows
        found[group, start:] = _divergence(model, plain[start:], states, temperature)
    for i, (_, stop) in enumerate(spans):
        found[i, :stop] = 0
    return found


@contextmanager
def _hidden(model: PreTrainedModel, spans: list[Span], hidden_in: dict[int, Tensor | None]) -> Iterator[None]:
    """Span i is hidden in row i of the batch."""
    everywhere = {layer for layer, heads in hidden_in.items() if heads is None}
    with ExitStack() as stack:
        if everywhere:
            stack.enter_context(suppress(model, spans, everywhere, each=True))
        for layer in hidden_in.keys() - everywhere:
            stack.enter_context(suppress(model, spans, {layer}, hidden_in[layer], each=True))
        yield


def _hidden_in(
    model: PreTrainedModel, heads: Sequence[tuple[int, int]] | None, layers: Collection[int] | None
) -> dict[int, Tensor | None]:
    """The heads of each layer in which sentences are hidden; None for all."""
    depth, width = len(decoder_layers(model)), model.config.get_text_config().num_attention_heads
    if len(attention_modules(model)) != depth:
        raise InputError(f"{type(model).__name__} has layers without attention; use a model that is all attention")
    for layer in layers or ():
        if not 0 <= layer < depth:
            raise InputError(f"layer {layer} does not exist; this model has 0 to {depth - 1}")
    wanted = set(range(depth)) if layers is None else set(layers)
    if heads is None:
        return dict.fromkeys(wanted)
    picked: dict[int, list[int]] = {}
    for layer, head in heads:
        if not (0 <= layer < depth and 0 <= head < width):
            raise InputError(
                f"the head ({layer}, {head}) does not exist; layers are 0 to {depth - 1}, heads 0 to {width - 1}"
            )
        if layer in wanted:
            picked.setdefault(layer, []).append(head)
    return {layer: torch.tensor(of, device=model.device) for layer, of in picked.items()}


def _groups(spans: Sequence[Span], total: int) -> Iterator[list[int]]:
    """Spans that run as one batch: as many as fit, from the end of the first on."""
    first = 0
    while first < len(spans):
        size = max(1, TOKENS // max(1, total - spans[first][1]))
        yield list(range(first, min(first + size, len(spans))))
        first += size


def _empty(model: PreTrainedModel) -> Any:
    cache = new_cache(model)
    if cache is None:
        raise InputError(f"{type(model).__name__} takes no key-value cache; use a model that does")
    return cache


def _body(model: PreTrainedModel, ids: Tensor, cache: Any) -> Tensor:
    """Last hidden states (rows, new, width), after the norm."""
    if not ids.shape[1]:
        return torch.zeros(0)
    run = cast(Any, decoder_body(model))
    return run(input_ids=ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state


def _divergence(model: PreTrainedModel, plain: Tensor, states: Tensor, temperature: float) -> Tensor:
    """KL (rows, T) of distributions at (rows, T, width) from those at (T, width), some columns at a time."""
    size = max(1, LOGITS // (len(states) * model.config.get_text_config().vocab_size))
    parts = []
    for first in range(0, len(plain), size):
        picked = slice(first, first + size)
        p = (head_logits(model, plain[picked]) / temperature).log_softmax(-1)
        q = (head_logits(model, states[:, picked]) / temperature).log_softmax(-1)
        apart = q - p
        parts.append((p.exp() * (apart.expm1() - apart)).sum(-1))  # no term is below 0, near 0 nothing cancels
    return torch.cat(parts, 1).cpu()
