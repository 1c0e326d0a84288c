"""Which heads look things up, and what a tiny cache does to each layer: measured offline, once per model.

CompressKV, arXiv 2508.02401, sections 3.1 and 3.3. `calibrate_model` in calibrate.py does both with prompts of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...hooks.attention import AttentionCall, observe
from ...models.anatomy import fingerprint, full_attention_layers, head_mixer, shape_of
from ..keep.topk import find_answer_span, keep_topk, rouge1_recall, semantic_retrieval_scores, window_scores
from .profile import HeadProfile

__all__ = ["NeedlePrompt", "identify_retrieval_heads", "layer_eviction_error"]


class NeedlePrompt(NamedTuple):
    """A prompt that hides `answer` somewhere and ends where the answer has to be written, and the answer."""

    prompt: str
    answer: str


@torch.no_grad()
def identify_retrieval_heads(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[NeedlePrompt],
    *,
    teacher_forced: bool = False,
    rouge_threshold: float = 0.5,
    max_new_tokens: int = 50,
) -> HeadProfile:
    """Rank each layer's heads by the attention they give the hidden answer while it is written (section 3.1).

    Args:
        teacher_forced: feed the right answer. Otherwise the model writes up to `max_new_tokens` tokens, until a
            newline, and prompts whose answer recalls at most `rouge_threshold` of the right words do not count.
            Small models fail many prompts; use teacher forcing for them.

    Returns:
        A profile without layer errors; scores are means over the prompts that count.

    Raises:
        InputError: no prompts, a prompt without its answer, or no prompt that the model answered.
    """
    total, counted = torch.zeros(()), 0
    for prompt in prompts:
        prompt_ids, answer_ids = _ids(tokenizer, prompt.prompt), _ids(tokenizer, prompt.answer)
        span = find_answer_span(prompt_ids, answer_ids)
        if teacher_forced:
            written, rows = answer_ids, _forced_rows(model, prompt_ids, answer_ids)
        else:
            written, rows = _written_rows(model, tokenizer, prompt_ids, max_new_tokens)
            if rouge1_recall(tokenizer.decode(written), prompt.answer) <= rouge_threshold:
                continue
        total = total + semantic_retrieval_scores(rows, span, prompt_ids, written).cpu()
        counted += 1
    if not counted:
        raise InputError(f"none of the {len(prompts)} prompts was answered; give easier prompts or teacher_forced=True")
    mean = total / counted
    order = mean.sort(dim=-1, descending=True, stable=True).indices
    return HeadProfile(
        model=model.config._name_or_path,
        fingerprint=fingerprint(model),
        **shape_of(model),
        order=tuple(map(tuple, order.tolist())),
        scores=tuple(tuple(round(s, 5) for s in row) for row in mean.tolist()),
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def _forced_rows(model: PreTrainedModel, prompt_ids: list[int], answer_ids: list[int]) -> Sequence[Tensor]:
    """The attention row that predicts each answer token, (L, H, keys) each, from one forward."""
    rows: list[Tensor] = []
    first = len(prompt_ids) - 1
    with observe(model, lambda call: rows.append(call.rows(slice(first, None))[0])):
        model(torch.tensor([prompt_ids + answer_ids[:-1]], device=model.device), use_cache=False)
    return torch.stack(rows).unbind(2)


def _written_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int], limit: int
) -> tuple[list[int], list[Tensor]]:
    """Greedy tokens up to a newline or the end, and the attention row that predicts each."""
    cache, written, steps = DynamicCache(config=model.config), [], []
    device = model.device
    model(torch.tensor([prompt_ids[:-1]], device=device), past_key_values=cache, use_cache=True)
    token = prompt_ids[-1]
    stop = tokenizer.eos_token_id
    while len(written) < limit:
        rows: list[Tensor] = []
        with observe(model, lambda call, rows=rows: rows.append(call.rows()[0, :, 0])):
            logits = model(torch.tensor([[token]], device=device), past_key_values=cache, use_cache=True).logits
        token = int(logits[0, -1].argmax())
        if token == stop or "\n" in tokenizer.decode([token]):
            break
        written.append(token)
        length = max(row.shape[-1] for row in rows)  # a sliding layer lacks its oldest columns
        steps.append(torch.stack([torch.nn.functional.pad(row, (length - row.shape[-1], 0)) for row in rows]))
    return written, steps


@torch.no_grad()
def layer_eviction_error(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[NeedlePrompt],
    profile: HeadProfile,
    *,
    budget: int = 32,
    window: int = 8,
    kernel: int = 5,
    top_heads: int = 4,
    eps: float = 1e-6,
) -> Tensor:
    """How much each layer's attention output changes when it sees only `budget` prompt tokens, (L,), sum 1.

    For every answer token fed after the prompt: ||Wo(short) - Wo(full)|| / (||Wo(full)|| + eps), summed over tokens
    and prompts (section 3.3). Every layer gets the input of the uncompressed model, so errors do not add up over
    layers; long answers weigh more. Sliding-window layers get 0.

    Raises:
        InputError: a profile of another model, a budget not above the window, a prompt not above the budget.
    """
    profile.check(model)
    if budget <= window:
        raise InputError(f"budget={budget} leaves nothing beside the window of {window}; give more than {window}")
    wanted = set(full_attention_layers(model))
    error = torch.zeros(profile.layers)
    for prompt in prompts:
        prompt_ids, answer_ids = _ids(tokenizer, prompt.prompt), _ids(tokenizer, prompt.answer)
        length = len(prompt_ids)
        if length <= budget:
            raise InputError(f"a prompt has {length} tokens; the error needs prompts of more than {budget}")

        def compare(call: AttentionCall, length: int = length) -> None:
            if call.layer not in wanted:
                return
            heads = profile.order[call.layer][:top_heads]
            queries, keys = call.query[:, :, length - window : length], call.key[:, :, :length]
            scores = window_scores(queries, keys, heads, kernel, call.scaling)
            kept = keep_topk(scores, budget - window)[0]
            project = head_mixer(model, call.layer)[0]
            error[call.layer] += _output_error(call, project, length, kept, window, eps)

        with observe(model, compare):
            model(torch.tensor([prompt_ids + answer_ids], device=model.device), use_cache=False)
    if not float(error.sum()) > 0:
        raise InputError("no layer lost anything; give prompts that are much longer than the budget")
    return error / error.sum()


def _output_error(call: AttentionCall, project: nn.Module, length: int, kept: Tensor, window: int, eps: float) -> float:
    """Relative change of the attention output of the tokens after the prompt, summed over them."""
    visible = torch.zeros(call.key.shape[2], dtype=torch.bool, device=kept.device)
    visible[kept] = True
    visible[length - window :] = True
    full = call.rows(slice(length, None))  # (1, H, n, keys)
    short = full * visible
    short = short / short.sum(-1, keepdim=True)  # the softmax over the visible keys
    values = call.value.float().repeat_interleave(call.heads // call.value.shape[1], dim=1)

    def output(rows: Tensor) -> Tensor:
        mixed = (rows @ values).transpose(1, 2).flatten(2)
        return project(mixed.to(call.value.dtype)).float()

    whole = output(full)
    return float(((output(short) - whole).norm(dim=-1) / (whole.norm(dim=-1) + eps)).sum())
