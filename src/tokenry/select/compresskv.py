"""CompressKV: a few heads that look at content decide which prompt tokens the cache keeps, layer by layer.

Offline, once per model: `identify_retrieval_heads` ranks the heads of each layer with needle prompts and
`layer_eviction_error` measures how much a tiny cache changes each layer's attention output. `calibrate_model` in
calibrate.py does both. At run time nothing is trained or looked up but the resulting `HeadProfile`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.fields import Block, Count, Multiple, Seed, Tokens
from ..hooks.attention import AttentionCall, observe
from ..models.anatomy import fingerprint, full_attention_layers, shape_of
from .contract import SelectMethod
from .cutters.cache import CacheCutter
from .heads.profile import HeadProfile
from .keep.keep_map import LayerView
from .keep.topk import (
    allocate_layer_budgets,
    find_answer_span,
    keep_topk,
    pool_window,
    rouge1_recall,
    semantic_retrieval_scores,
    window_scores,
)

__all__ = ["CompressKV", "NeedlePrompt", "identify_retrieval_heads", "layer_eviction_error", "shipped_profile"]

SHIPPED = Path(__file__).parent / "heads" / "data" / "smollm2.json"


class NeedlePrompt(NamedTuple):
    """A prompt that hides `answer` somewhere and ends where the answer has to be written, and the answer."""

    prompt: str
    answer: str


# --- offline: which heads retrieve -----------------------------------------------------------------------------


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
            error[call.layer] += _output_error(call, length, kept, window, eps)

        with observe(model, compare):
            model(torch.tensor([prompt_ids + answer_ids], device=model.device), use_cache=False)
    if not float(error.sum()) > 0:
        raise InputError("no layer lost anything; give prompts that are much longer than the budget")
    return error / error.sum()


def _output_error(call: AttentionCall, length: int, kept: Tensor, window: int, eps: float) -> float:
    """Relative change of the attention output of the tokens after the prompt, summed over them."""
    visible = torch.zeros(call.key.shape[2], dtype=torch.bool, device=kept.device)
    visible[kept] = True
    visible[length - window :] = True
    full = call.rows(slice(length, None))  # (1, H, n, keys)
    short = full * visible
    short = short / short.sum(-1, keepdim=True)  # the softmax over the visible keys
    values = call.value.float().repeat_interleave(call.heads // call.value.shape[1], dim=1)
    project = call.module.o_proj

    def output(rows: Tensor) -> Tensor:
        mixed = (rows @ values).transpose(1, 2).flatten(2)
        return project(mixed.to(call.value.dtype)).float()

    whole = output(full)
    return float(((output(short) - whole).norm(dim=-1) / (whole.norm(dim=-1) + eps)).sum())


# --- the method ------------------------------------------------------------------------------------------------


def _read_profile(value: Any) -> Any:
    return HeadProfile.load(value) if isinstance(value, str | Path) else value


@lru_cache(maxsize=1)
def shipped_profile() -> HeadProfile:
    """The profile of the embedded SmolLM2-135M-Instruct, made by calibrate.py."""
    return HeadProfile.load(SHIPPED)


@dataclass(frozen=True)
class HeadVote:
    """What the newest `window` tokens look at, as seen by chosen heads of each layer."""

    heads: dict[int, Sequence[int]]
    window: int
    kernel: int
    reads_attention: bool = field(default=True, init=False)

    def score(self, view: LayerView) -> Tensor:
        rows = view.attention(self.window, self.heads[view.layer])
        return torch.nn.functional.pad(pool_window(rows, self.kernel), (0, self.window))


class CompressKV(SelectMethod):
    """Keep `budget` cache entries per layer (on average), chosen by each layer's semantic retrieval heads.

        with CompressKV(budget=128)(model):
            model.generate(**inputs)

    `min_tokens` is 12 by default, which suits small models and budgets of 24 to 128. The paper uses 32, with budgets
    from 128 to 2048. Layers for which the prompt is not longer than their budget keep everything, so short prompts
    give exactly the plain model's output.
    """

    slug: ClassVar[str] = "compresskv"
    title: ClassVar[str] = "CompressKV"
    paper: ClassVar[str] = (
        "CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before Generation, arXiv 2508.02401"
    )
    claim: ClassVar[str] = (
        "Letting only semantic retrieval heads vote, with a budget for each layer, keeps more of the answer at the "
        "same cache size than letting all heads vote."
    )

    profile: Annotated[
        HeadProfile | None, BeforeValidator(_read_profile), WithJsonSchema({"type": "string"}, mode="validation")
    ] = Field(None, description="head profile (JSON) made for the model; the embedded model brings its own")
    budget: int = Field(
        256, ge=2, le=2**20, description="cache entries per layer, mean over layers; more than the window"
    )
    window: Tokens = Field(8, description="newest prompt tokens, which vote and are always kept")
    kernel: Block = Field(5, description="width of the average over neighboring tokens; odd")
    top_heads: Count = Field(4, description="voting heads per layer; at most the model's heads")
    adaptive: bool = Field(True, description="give layers that suffer more from a short cache a larger budget")
    min_tokens: int = Field(
        12, ge=2, le=2**20, description="smallest layer budget; above the window, at most the budget"
    )
    max_factor: Multiple = Field(3.0, description="largest layer budget, as a multiple of the budget")
    heads: Literal["retrieval", "random", "lowest", "all"] = Field(
        "retrieval", description="which heads vote; the others are controls"
    )
    seed: Seed = Field(0, description="seed of the random heads")

    @model_validator(mode="after")
    def _fits_together(self) -> CompressKV:
        if self.budget <= self.window:
            raise ValueError(f"budget={self.budget} must be above window={self.window}; raise it or shorten the window")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} is even; give an odd number such as {self.kernel + 1}")
        if self.adaptive and not self.window < self.min_tokens <= self.budget:
            raise ValueError(
                f"min_tokens={self.min_tokens} must be above window={self.window} and at most budget={self.budget}; "
                f"give a number in between or adaptive=false"
            )
        return self

    def __call__(self, model: PreTrainedModel) -> CacheCutter:
        """The context manager that compresses every prefill of `model`; its `.trace` is the last `KeepMap`.

        Raises:
            InputError: no fitting profile, too many heads, a profile without errors when adaptive, a model whose
                attention or cache cannot be cut, right-padded prompts (at prefill).
        """
        layers = full_attention_layers(model)
        profile = self._profile_for(model)
        vote = HeadVote(self._choose_heads(model, layers, profile), self.window, self.kernel)
        return CacheCutter(model, vote, self._budgets(layers, profile), protect_last=self.window)

    def _profile_for(self, model: PreTrainedModel) -> HeadProfile | None:
        if not self.adaptive and self.heads in ("all", "random"):
            return None  # nothing in it is used
        if self.profile is not None:
            self.profile.check(model)
            return self.profile
        shipped = shipped_profile()
        if not shipped.fits(model):
            raise InputError(
                f"there is no head profile for {model.config._name_or_path or type(model).__name__}; make one with "
                "tokenry.select.calibrate_model(model, tokenizer) and give it as profile=..."
            )
        return shipped

    def _choose_heads(
        self, model: PreTrainedModel, layers: list[int], profile: HeadProfile | None
    ) -> dict[int, Sequence[int]]:
        count, top = shape_of(model)["heads"], self.top_heads
        if self.heads == "all":
            return {layer: range(count) for layer in layers}
        if top > count:
            raise InputError(f"top_heads={top} is more than the model's {count} heads; give 1 to {count}")
        if self.heads == "random":
            return {layer: random.Random(f"{self.seed} {layer}").sample(range(count), top) for layer in layers}
        short = [layer for layer in layers if len(profile.order[layer]) < top]
        if short:
            raise InputError(
                f"the head profile names {len(profile.order[short[0]])} heads in layer {short[0]}, top_heads={top}; "
                "lower top_heads or make a new profile"
            )
        part = slice(None, top) if self.heads == "retrieval" else slice(-top, None)
        return {layer: profile.order[layer][part] for layer in layers}

    def _budgets(self, layers: list[int], profile: HeadProfile | None) -> dict[int, int]:
        if not self.adaptive:
            return dict.fromkeys(layers, self.budget)
        if profile.error is None:
            raise InputError(
                "the head profile has no layer errors; measure them with layer_eviction_error or give adaptive=False"
            )
        error = [profile.error[layer] for layer in layers]
        most = int(self.max_factor * self.budget)
        return dict(zip(layers, allocate_layer_budgets(error, self.budget * len(layers), self.min_tokens, most)))
