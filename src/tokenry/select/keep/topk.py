"""Scores, budgets and choices as plain tensors and integers: nothing here knows a model or transformers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from ...core.errors import InputError

__all__ = [
    "allocate_layer_budgets",
    "allocate_proportional",
    "find_answer_span",
    "keep_topk",
    "pool_window",
    "rouge1_recall",
    "semantic_retrieval_scores",
    "stage_counts",
    "window_attention",
    "window_scores",
]

# --- shared by every select method -----------------------------------------------------------------------------


def keep_topk(scores: Tensor, n: int, protect: Tensor | None = None, sort: bool = True) -> Tensor:
    """Indices of the n best entries along the last dimension.

    Args:
        scores: (..., T). Equal scores keep the lower index.
        n: how many to keep; more than T keeps all.
        protect: bool, broadcasts to (..., T); these are always among the kept.
        sort: ascending indices, else best first (protected ones lead).

    Returns:
        (..., min(n, T)) int64.

    Raises:
        InputError: n is negative or smaller than the number of protected entries.
    """
    if n < 0:
        raise InputError(f"cannot keep {n} tokens; give a number >= 0")
    if protect is not None:
        most = int(protect.sum(-1).max()) if protect.numel() else 0
        if n < most:
            raise InputError(f"cannot keep {n} tokens when {most} are protected; keep at least {most}")
        scores = torch.where(protect, math.inf, scores)
    # torch.topk promises no order among equals, a stable sort does
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    return best.sort(dim=-1).values if sort else best


def allocate_proportional(
    weights: Sequence[float],
    total: int,
    cap: int,
    floor: int = 0,
    rounding: Literal["floor", "half_even"] = "floor",
    redistribute: bool = False,
) -> list[int]:
    """Split `total` units over parts in proportion to `weights`, each part within [floor, cap].

    Each part first gets floor + round(share of what the floors leave). What rounding or the floors put above the
    total is taken back one unit a part and pass, smallest weight first; with `redistribute`, what is left over is
    given one unit a part and pass, largest weight first. Equal weights are served in order.

    Never above `total`; exactly `total` with `redistribute` unless every part is at its cap.

    Raises:
        InputError: weights that are negative, not finite or sum to zero; a floor above the cap; floors above the total.
    """
    count = len(weights)
    if not count or not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) <= 0:
        raise InputError("weights must be finite, >= 0 and not all zero; check the errors or scores they come from")
    if not 0 <= floor <= cap:
        raise InputError(f"a part cannot have at least {floor} and at most {cap} tokens; lower the minimum")
    if total < count * floor:
        raise InputError(
            f"a total of {total} cannot give {count} parts {floor} tokens each; raise the budget or lower the minimum"
        )
    whole = sum(weights)
    to_integer = math.floor if rounding == "floor" else round  # Python rounds half to even
    spare = total - count * floor
    parts = [min(max(floor + to_integer(w / whole * spare), floor), cap) for w in weights]
    rising = sorted(range(count), key=lambda i: weights[i])
    falling = sorted(range(count), key=lambda i: -weights[i])
    _step(parts, rising, sum(parts) - total, -1, floor)
    if redistribute:
        _step(parts, falling, total - sum(parts), 1, cap)
    return parts


def _step(parts: list[int], order: list[int], units: int, sign: int, bound: int) -> None:
    """Change `parts` by `sign`, one unit each in `order`, pass after pass, until `units` are spent."""
    while units > 0:
        movable = [i for i in order if parts[i] != bound]
        if not movable:
            return
        for i in movable[:units]:
            parts[i] += sign
        units -= min(units, len(movable))


def stage_counts(
    n0: int,
    ratios: Sequence[float],
    of: Literal["original", "current"] = "original",
    rounding: Literal["int", "ceil_odd"] = "int",
) -> list[int]:
    """Tokens left after each stage: ratio times the original or the current count.

    `int` cuts the fraction off; `ceil_odd` rounds up to the next odd number (at most what is there).

    Raises:
        InputError: a ratio outside [0, 1], or counts that would grow from one stage to the next.
    """
    counts, current = [], n0
    for ratio in ratios:
        if not 0 <= ratio <= 1:
            raise InputError(f"a keep ratio of {ratio} is outside [0, 1]; give the share of tokens to keep")
        wanted = ratio * (n0 if of == "original" else current)
        count = int(wanted) if rounding == "int" else min(math.ceil(wanted) // 2 * 2 + 1, current)
        if count > current:
            raise InputError(f"a stage cannot keep {count} of {current} tokens; order the ratios from large to small")
        counts.append(count)
        current = count
    return counts


# --- CompressKV ------------------------------------------------------------------------------------------------


def window_attention(
    q_window: Tensor, keys: Tensor, heads: Sequence[int] | Tensor, scaling: float | None = None
) -> Tensor:
    """Attention of the last w prompt positions, causal, softmax in float32: (batch, heads chosen, w, T).

    Args:
        q_window: (batch, H, w, head_dim), queries of the last w positions, after rotary embedding.
        keys: (batch, KV, T, head_dim), the whole prompt. Query head h reads key head h // (H / KV).
        heads: query heads to compute.
        scaling: factor on the scores; default head_dim ** -0.5.
    """
    w, length = q_window.shape[2], keys.shape[2]
    heads = torch.as_tensor(heads, device=keys.device)
    group = q_window.shape[1] // keys.shape[1]
    scale = q_window.shape[-1] ** -0.5 if scaling is None else scaling
    scores = q_window[:, heads].float() @ keys[:, heads // group].float().transpose(-1, -2) * scale
    column = torch.arange(length, device=keys.device)
    future = column > column[length - w :, None]
    return scores.masked_fill(future, torch.finfo(torch.float32).min).softmax(-1).to(keys.dtype)


def pool_window(rows: Tensor, kernel: int = 5) -> Tensor:
    """Score of every token before the window, (batch, T - w), from attention rows (batch, heads, w, T).

    Sum over the window's queries, average-pool along time (zeros outside count), mean over heads (section 3.2).

    Raises:
        InputError: an even kernel, or a prompt that is not longer than the window.
    """
    w, length = rows.shape[-2:]
    if kernel < 1 or kernel % 2 == 0:
        raise InputError(f"kernel={kernel} is not odd; give 1, 3, 5, ...")
    if length <= w:
        raise InputError(f"a prompt of {length} tokens has none before a window of {w}; give a longer prompt")
    summed = rows[..., : length - w].sum(-2)
    return avg_pool1d(summed, kernel, stride=1, padding=kernel // 2).mean(1)


def window_scores(
    q_window: Tensor,
    keys: Tensor,
    heads: Sequence[int] | Tensor,
    kernel: int = 5,
    scaling: float | None = None,
) -> Tensor:
    """How much the prompt's last w positions look at each earlier token, (batch, T - w). See `window_attention`."""
    return pool_window(window_attention(q_window, keys, heads, scaling), kernel)


def allocate_layer_budgets(
    error: Sequence[float] | Tensor, total: int, min_tokens: int = 32, max_tokens: int | None = None
) -> list[int]:
    """Cache entries per layer, in proportion to the damage a tiny cache does to each layer.

    Left-over units go one to each layer a pass, as in the authors' code; their Algorithm 1 gives all of them to the
    layer with the largest error. The totals agree.

    Args:
        error: (L,) errors >= 0, any scale.
        total: sum of the budgets; less is given only when every layer has `max_tokens`.
        max_tokens: default three times the mean budget.

    Raises:
        InputError: see `allocate_proportional`.
    """
    error = [float(e) for e in error]
    if not error:
        raise InputError("the error vector is empty; give one error per layer")
    cap = 3 * (total // len(error)) if max_tokens is None else max_tokens
    return allocate_proportional(error, total, cap, min_tokens, "half_even", redistribute=True)


def find_answer_span(prompt_ids: Sequence[int], answer_ids: Sequence[int], coverage: float = 0.9) -> tuple[int, int]:
    """The first window [a, b) of the answer's length that holds more than `coverage` of the answer's distinct ids.

    Raises:
        InputError: an empty answer, or no such window.
    """
    wanted, size = set(answer_ids), len(answer_ids)
    if not wanted:
        raise InputError("the answer is empty; give the text that the prompt hides")
    for start in range(len(prompt_ids) - size + 1):
        if len(wanted & set(prompt_ids[start : start + size])) > coverage * len(wanted):
            return start, start + size
    raise InputError("the prompt does not contain its answer; put the needle into the prompt word by word")


def semantic_retrieval_scores(
    attn_steps: Iterable[Tensor],
    span: tuple[int, int],
    prompt_ids: Sequence[int],
    generated_ids: Sequence[int],
    mode: Literal["semantic", "topk"] = "semantic",
) -> Tensor:
    """How strongly each head looks at the answer while it is written, (L, H) float32.

    Args:
        attn_steps: one (L, H, keys) tensor per step: the attention row of the token that predicts the step's token.
        span: [a, b), where the answer stands in the prompt.
        generated_ids: the token predicted at each step.
        mode: "semantic" adds, for a predicted token that occurs m times in the span, m times the attention mass on
            the whole span (the paper's indicator, counted per position as in the authors' code). "topk" is the
            classic retrieval score: 1 / (b - a) when the head's strongest key is a copy of the predicted token.
    """
    start, stop = span
    inside = list(prompt_ids[start:stop])
    score: Tensor | float = 0.0
    for row, token in zip(attn_steps, generated_ids, strict=True):
        row = row.float()
        if mode == "semantic":
            score = score + inside.count(token) * row[..., start:stop].sum(-1)
        else:
            best = row.argmax(-1)
            copies = torch.tensor([i for i in range(start, stop) if prompt_ids[i] == token], device=row.device)
            score = score + torch.isin(best, copies).float() / (stop - start)
    if not isinstance(score, Tensor):
        raise InputError("no token was generated; give at least one step")
    return score


def rouge1_recall(text: str, reference: str) -> float:
    """Share of the reference's words, with their counts, that `text` has too. Words are lower-cased and stemmed."""
    have, want = _stems(text), _stems(reference)
    found = sum(min(have.count(word), want.count(word)) for word in set(want))
    return found / max(1, len(want))


def _stems(text: str) -> list[str]:
    import snowballstemmer  # here, so that the kvpress press needs no more than torch and pydantic

    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return snowballstemmer.stemmer("porter").stemWords(words)
