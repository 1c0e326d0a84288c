"""Suppression: what hiding a sentence from all that comes after it does to the next-token distributions there.

What comes before the end of a sentence does not change, so it is taken from the cache of one plain forward. What comes
after it is fed in parts, so that attention does not compute what the mask hides behind each; where little is left,
several sentences run as one batch, each hidden in a row of its own. The plain run's logits serve several sentences.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ...core.errors import InputError
from ...core.fields import require
from ...hooks.attention import suppress
from ...models.anatomy import attention_modules, decoder_body, decoder_layers
from ...models.kv_cache import beginning_of, new_cache
from ...text.sentences import check_spans
from ...text.spans import Span
from ...trace.recorder import head_logits
from ...trace.trace import Trace
from .sentences import sentences_of

__all__ = ["suppressed_kl", "suppression_matrix"]

TOKENS = {"cpu": 384}  # fed at a time, rows times length; more of them are no faster for each
MANY = 2048  # the same on other devices
COLUMNS = 4096  # of the cache of a batch, rows times length, so that memory stays that of a plain forward
SPARE = 1.25  # times as many tokens as one by one that a batch may run
SHARING = 8  # sentences that share the logits of the plain run
LOGITS = 2**23  # elements of a chunk of logits
FLOOR = 1e-9  # added to a divergence before its logarithm
PORTION, MOST = 0.9999, 100  # of a distribution the authors keep the likeliest tokens up to this share, at most so many
ABSENT = -1e9  # their logit of any other token
Align = Literal["position", "token"]
Support = Literal["dense", "nucleus"]


def suppression_matrix(
    model: PreTrainedModel,
    trace: Trace,
    heads: Sequence[tuple[int, int]] | None = None,
    layers: Collection[int] | None = None,
    log: bool = True,
    center: bool = True,
    temperature: float = 0.6,
    align: Align = "position",
    kl_support: Support = "dense",
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
        kl_support: see `suppressed_kl`.

    Raises:
        InputError: a trace of another model or of one sentence; a head, layer or temperature that cannot be.
    """
    trace.check_model(model)
    spans = [(s.start, s.stop) for s in sentences_of(trace)]
    if len(spans) < 2:
        raise InputError(f"there are {len(spans)} sentences; suppression needs at least 2")
    effects = suppressed_kl(model, trace.ids, spans, heads, layers, temperature, kl_support)
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
    kl_support: Support = "dense",
) -> Tensor:
    """KL(plain || suppressed) in nats (spans, T) after each token; 0 up to the end of the span, where nothing changes.

    Args:
        ids: (T,) the tokens.
        spans: half-open token ranges in order, without overlap.
        heads, layers: see `suppression_matrix`.
        kl_support: "dense" compares whole distributions. "nucleus" is there for numbers like those of the authors'
            code, which keeps the likeliest tokens up to a share of 0.9999, at most 100, of each distribution: any other
            has a logit of -1e9, and where a kept token of the plain one is such in the suppressed one, the divergence
            is its probability times more than a billion.

    Raises:
        InputError: spans, heads, layers or a temperature that cannot be; a model that is not all attention.
    """
    require(temperature > 0, "temperature", temperature, "a number above 0")
    if kl_support not in get_args(Support):
        raise InputError(f"kl_support={kl_support!r} is not allowed; give dense or nucleus")
    check_spans(spans, len(ids))
    hidden_in = _hidden_in(model, heads, layers)
    tokens = ids.to(model.device)[None]
    cache, most = _empty(model), TOKENS.get(model.device.type, MANY)
    states = _body(model, tokens, cache).repeat(1 + min(SHARING, len(spans)), 1, 1)  # the first row stays plain
    found = torch.zeros(len(spans), len(ids))
    for first in range(0, len(spans), SHARING):
        some = spans[first : first + SHARING]
        for group in _groups(some, len(ids), most):
            with _hidden(model, [some[i] for i in group], hidden_in):
                _run_again(model, tokens, cache, some[group[0]][1], most, states[1 + group[0] : 2 + group[-1]])
        stops = [stop for _, stop in some]
        found[first : first + SHARING] = _divergence(model, states, stops, temperature, kl_support)
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


def _groups(spans: Sequence[Span], total: int, most: int) -> Iterator[list[int]]:
    """Spans that run as one batch of at most so many tokens, each from the end of the first on: neighbors, of which the
    later ones run few tokens more than from their own end on."""
    group: list[int] = []
    for i in range(len(spans)):
        alone = sum(total - spans[k][1] for k in (*group, i))
        together = (len(group) + 1) * (total - spans[group[0] if group else i][1])
        if group and (together > min(most, SPARE * alone) or (len(group) + 1) * total > COLUMNS):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def _empty(model: PreTrainedModel) -> Cache:
    """A cache of which any beginning can be taken."""
    cache = new_cache(model)
    if cache is None:
        raise InputError(f"{type(model).__name__} takes no key-value cache; use a model that does")
    cache.activate_past_recording()  # so that layers with a window keep all
    return cache


def _run_again(model: PreTrainedModel, tokens: Tensor, cache: Cache, start: int, most: int, states: Tensor) -> None:
    """Overwrite the last hidden states (rows, T, width) from `start` on, at most so many at a time; the cache stays."""
    rows, total, _ = states.shape
    begun, size = beginning_of(cache, total - start, rows), max(1, most // rows)
    for first in range(start, total, size):
        picked = slice(first, first + size)
        states[:, picked] = _body(model, tokens[:, picked].expand(rows, -1), begun)


def _body(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Last hidden states (rows, new, width), after the norm."""
    return cast(Any, decoder_body(model))(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state


def _divergence(
    model: PreTrainedModel, states: Tensor, stops: list[int], temperature: float, kl_support: Support
) -> Tensor:
    """KL (rows, T) from the distributions at the first of (1 + rows, T, width), of each other from its stop on."""
    between, total = _dense if kl_support == "dense" else _of_nuclei, states.shape[1]
    found = torch.zeros(len(stops), total, device=states.device)
    for rows, (start, end) in enumerate(pairwise([*stops, total]), 1):
        size = max(1, LOGITS // ((1 + rows) * model.config.get_text_config().vocab_size))
        for first in range(start, end, size):
            picked = slice(first, min(first + size, end))
            found[:rows, picked] = between(head_logits(model, states[: 1 + rows, picked]), temperature)
    return found.cpu()


def _dense(logits: Tensor, temperature: float) -> Tensor:
    logs = logits.div_(temperature).log_softmax(-1)
    apart = logs[1:].sub_(logs[0])
    return apart.expm1().sub_(apart).mul_(logs[0].exp()).sum(-1)  # no term is below 0, near 0 nothing cancels


def _of_nuclei(logits: Tensor, temperature: float) -> Tensor:
    logs = _nucleus(logits, temperature)
    return (logs[0].exp() * (logs[0] - logs[1:])).sum(-1).clamp(min=0)


def _nucleus(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities (..., vocab) of the likeliest tokens alone; those of others are far below any number's log."""
    scaled = logits.div_(temperature)
    shares, at = scaled.double().softmax(-1).topk(min(MOST, logits.shape[-1]))
    before = shares.cumsum(-1) - shares
    kept = torch.where(before < PORTION, scaled.gather(-1, at), ABSENT / temperature)
    return torch.full_like(scaled, ABSENT / temperature).scatter(-1, at, kept).log_softmax(-1)
