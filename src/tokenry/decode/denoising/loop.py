"""Sampling from masked-diffusion language models: the model, the state, and the loop that every method plugs into.

Papers: LLaDA, arXiv 2502.09992; Dream 7B, arXiv 2508.15487; Fast-dLLM, arXiv 2505.22618. The answer starts as a window
of masks after the prompt. Each step the model predicts all masks at once, a few predictions are committed, and the
others stay masked, block by block from left to right.

What a method can bring: an `UnmaskPolicy` (which predictions are committed), `LogitsTransform`s (what the logits are
before that), and a `LengthPolicy` (how wide the window is). All of them read a `DiffusionState`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...core.errors import InputError
from ...core.fields import Temperature, TorchSeed, check
from ...models.batch import position_ids
from ...models.masks import check_bidirectional, check_mask_token, own_position
from ..generation.output import UNSET, DecodeOutput
from .cache import DiffusionCache
from .state import DiffusionState, Edit, Prediction
from .unmask import FixedCount, UnmaskPolicy

__all__ = [
    "DiffusionOutput",
    "DiffusionStats",
    "LengthPolicy",
    "LogitsTransform",
    "MaskedDiffusionModel",
    "diffusion_generate",
    "sampling_warpers",
]


# --- the model -----------------------------------------------------------------------------------------------------


class MaskedDiffusionModel:
    """A transformer that predicts what stands behind masks.

    Args:
        model: any decoder whose attention sees both sides (`tokenry.models.masks.make_bidirectional` makes one).
        tokenizer: where mask and end-of-text token are looked up if the config has none.
        mask_token_id, eos_token_id: by default those of the config, then of the tokenizer.
        shift: a token is read from the logits of the position before it (Dream), not of its own (LLaDA). By default
            what the config says under `token_shift`, else False.

    Raises:
        InputError: no mask token, one that is the end-of-text or padding token, or a causal model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        shift: bool | None = None,
    ) -> None:
        self.model, config = model, model.config
        self.mask_token_id = _first(mask_token_id, _id(config, "mask_token_id"), _id(tokenizer, "mask_token_id"))
        self.eos_token_id = _first(eos_token_id, _id(config, "eos_token_id"), _id(tokenizer, "eos_token_id"))
        self.pad_token_id = _first(_id(config, "pad_token_id"), _id(tokenizer, "pad_token_id"), self.eos_token_id)
        self.shift = bool(_first(shift, getattr(config, "token_shift", None), False))
        if self.mask_token_id is None:
            raise InputError("the model has no mask token; give mask_token_id, an id that never occurs in text")
        check_mask_token(model, self.mask_token_id)
        if self.mask_token_id in (self.eos_token_id, self.pad_token_id):
            raise InputError(
                f"mask_token_id={self.mask_token_id} is the end-of-text or padding token; give another one"
            )
        check_bidirectional(model)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def logits(self, x: Tensor, present: Tensor, cache: DiffusionCache | None = None) -> Tensor:
        """float32 logits (batch, time, vocabulary) of each position's own token; the mask token is never predicted.

        Args:
            x: ids (batch, time).
            present: what is no padding (batch, time), bool.
            cache: computes only its columns; the others keep the logits of the time when they were last computed.
        """
        positions = position_ids(present)
        if cache is None:
            mask = None if present.all() else present.long()
            raw = self.model(input_ids=x, attention_mask=mask, position_ids=positions, use_cache=False).logits.float()
        else:
            raw = cache.run(self.model, x, present, positions)
        logits = own_position(raw, self.shift).clone()
        logits[..., self.mask_token_id] = float("-inf")
        return logits

    def predict(self, state: DiffusionState, cache: DiffusionCache | None = None, rows: Tensor | None = None) -> Tensor:
        """`logits` of a state, counted as a forward of these rows (batch,); by default of those with masks to fill.
        Others are not fed to the model, and have no preference where a cache has kept nothing of them."""
        rows = state.working if rows is None else rows
        if cache is None:
            state.count(0, state.x.shape[1], rows)
            return self._logits_of(rows, state)
        cache.begin(state, self.shift)
        state.count(cache.first, cache.last, rows, cache.calls)
        return self.logits(state.x, state.present, cache)

    def _logits_of(self, rows: Tensor, state: DiffusionState) -> Tensor:
        """`logits`; in the other rows all tokens alike, but for the mask token."""
        if bool(rows.all()):
            return self.logits(state.x, state.present)
        found = self.logits(state.x[rows], state.present[rows])
        logits = found.new_zeros(len(rows), *found.shape[1:]).masked_scatter_(rows[:, None, None], found)
        logits[..., self.mask_token_id] = float("-inf")
        return logits


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _id(source: Any, name: str) -> int | None:
    """A token id of a config or tokenizer; the first one where there are several."""
    value = getattr(source, name, None)
    return value[0] if isinstance(value, list | tuple) else value


# --- what plugs in -------------------------------------------------------------------------------------------------


class LogitsTransform:
    """Changes the logits before anything is chosen from them. `model` is set when a generation starts."""

    model: MaskedDiffusionModel

    def reset(self, state: DiffusionState) -> None:
        """A new generation starts."""

    def __call__(self, logits: Tensor, state: DiffusionState) -> Tensor:
        raise NotImplementedError

    def reindex(self, edit: Edit) -> None:
        """Columns have moved: bring what is kept for each column to its new place."""


class LengthPolicy:
    """Decides how wide the window of each row is. This one leaves it as it is."""

    def initial(self, model: MaskedDiffusionModel, state: DiffusionState) -> None:
        """Before the first step: may run `model.predict(state)` and change the window with `state.apply(edit)`."""

    def edit(self, prediction: Prediction, commit: Tensor, state: DiffusionState) -> Edit | None:
        """After each choice `commit` (batch, time), before it is written: how columns move once it is."""
        return None


def sampling_warpers(
    do_sample: bool = False, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> list[LogitsProcessor] | None:
    """What `diffusion_generate` draws with, from options of `generate`; None takes the most likely tokens."""
    if not do_sample:
        return None
    if not temperature > 0:
        raise InputError(f"temperature={temperature} is not allowed; give a number > 0, or do_sample=False")
    check("temperature", temperature, Temperature)
    warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(float(temperature))]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    return warpers + ([MinPLogitsWarper(min_p)] if min_p else [])


def _predict(logits: Tensor, warpers: Sequence[LogitsProcessor] | None, state: DiffusionState) -> Prediction:
    """The most likely tokens, or with warpers drawn ones where a row works."""
    tokens = logits.argmax(-1)
    if warpers is not None:
        for row in state.working.nonzero().flatten().tolist():
            window = slice(state.start, int(state.end[row]))
            tokens[row, window] = _sample(logits[row, window], warpers, state.generators.rows[row])
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    return Prediction(logits, tokens, (chosen - logits.logsumexp(-1)).exp())


NO_IDS: Any = None  # warpers look at the scores alone


def _sample(logits: Tensor, warpers: Sequence[LogitsProcessor], generator: torch.Generator | None) -> Tensor:
    for warper in warpers:
        logits = warper(NO_IDS, logits)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


# --- the result ----------------------------------------------------------------------------------------------------


@dataclass
class DiffusionStats:
    """What a generation cost and when it decided, row by row.

    Attributes:
        nfe: forwards in which the row still had masks (batch,); what is known as number of function evaluations.
        tokens_processed: tokens of the row fed to the model (batch,).
        forward_calls: calls of the model for the whole batch.
        commit_step: for each token of a row's window, the forward (1 is the first) after which it was committed, and 0
            if a length policy wrote it.
        commit_confidence: its confidence then.
        effective_tokens: tokens before the first end-of-text token (batch,).
        seconds: of the whole generation.
    """

    nfe: list[int]
    tokens_processed: list[int]
    forward_calls: int
    commit_step: list[list[int]]
    commit_confidence: list[list[float]]
    effective_tokens: list[int]
    seconds: float

    @property
    def tokens_per_forward(self) -> list[float]:
        """Width of the window over `nfe`, row by row."""
        return [len(steps) / max(1, n) for steps, n in zip(self.commit_step, self.nfe)]

    def summary(self) -> dict[str, Any]:
        """The first row, for JSON."""
        confidence = [round(p, 4) for p in self.commit_confidence[0]]
        return {"denoising": {"nfe": self.nfe[0], "step": self.commit_step[0], "confidence": confidence}}

    def in_words(self) -> str:
        """What the command line says of the first row."""
        width, passes = len(self.commit_step[0]), "pass" if self.nfe[0] == 1 else "passes"
        return f"{self.effective_tokens[0]} tokens, in a window of {width}, with {self.nfe[0]} forward {passes}"


@dataclass
class DiffusionOutput(DecodeOutput):
    """Result of `diffusion_generate`, and what it has in common with that of the other loop.

    `sequences` (batch, time) are prompt and window, padded as they were; `windows` are the windows alone, and `new_ids`
    what stands in them before the first end-of-text token, a list per row. `texts` needs a tokenizer.
    """

    windows: list[list[int]] = UNSET
    stats: DiffusionStats = UNSET


# --- the loop ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def diffusion_generate(
    model: MaskedDiffusionModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    gen_length: int = 128,
    block_length: int | None = 32,
    unmask: UnmaskPolicy | None = None,
    transforms: Sequence[LogitsTransform] = (),
    length: LengthPolicy | None = None,
    cache: str = "none",
    warpers: Sequence[LogitsProcessor] | None = None,
    seed: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> DiffusionOutput:
    """Fill a window after each prompt.

    Args:
        input_ids, attention_mask: prompts (batch, time), padded on the left.
        gen_length: width of the window, a multiple of `block_length` unless `length` may change it.
        block_length: blocks are finished one after the other; None, or more than the window has: the whole window.
        unmask: by default one token per step.
        length: how windows change; by default they do not.
        cache: "none"; "prefix" keeps keys and values of what is before the block, "dual" also of what is after it. Both
            are approximate, and computed anew at the start of each block.
        warpers: truncation and temperature of drawn tokens, see `sampling_warpers`; None: the most likely ones.
        seed: makes all that is drawn repeatable, tokens and positions, row by row; None uses torch's global generator.
        tokenizer: gives the texts.

    Raises:
        InputError: a length out of range, a mask token in a prompt, padding on the right, or a window beyond the
            model's context.
    """
    start = time.perf_counter()
    if seed is not None:
        check("seed", seed, TorchSeed)
    present = _check_prompts(model, input_ids, attention_mask)
    state = DiffusionState.begin(model, input_ids.to(model.device), present, gen_length, block_length, seed)
    if length is None and gen_length > state.block_length and gen_length % state.block_length:
        raise InputError(
            f"gen_length={gen_length} is not a multiple of block_length={block_length}; change one of them"
        )
    unmask, length = unmask or FixedCount(), length or LengthPolicy()
    columns = DiffusionCache.named(cache)
    length.initial(model, state)
    for transform in transforms:
        transform.model = model
    for part in (unmask, *transforms):
        part.reset(state)
    while bool(state.active.any()):
        logits = model.predict(state, columns)
        for transform in transforms:
            logits = transform(logits, state)
        prediction = _predict(logits, warpers, state)
        commit = unmask.select(prediction, state)
        edit = length.edit(prediction, commit, state)
        state.commit(prediction, commit)
        if edit is not None:
            state.apply(edit)
            for part in (unmask, *transforms, *([columns] if columns else ())):
                part.reindex(edit)
        state.advance(together=columns is not None)
    return _output(model, state, tokenizer, start)


def _check_prompts(model: MaskedDiffusionModel, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """What is no padding (batch, time)."""
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise InputError(f"input_ids have shape {tuple(input_ids.shape)}; give (batch, time) with at least one token")
    present = (torch.ones_like(input_ids) if attention_mask is None else attention_mask).bool()
    if present.shape != input_ids.shape:
        raise InputError(f"attention_mask has shape {tuple(present.shape)}, input_ids {tuple(input_ids.shape)}")
    if not present[:, -1].all() or (present[:, :-1] & ~present[:, 1:]).any():
        raise InputError("prompts are padded on the right; pad them on the left (tokenizer.padding_side='left')")
    if (input_ids[present] == model.mask_token_id).any():
        raise InputError(f"a prompt contains the mask token {model.mask_token_id}; the window of masks is added here")
    edges = input_ids[:, [0, -1]]
    if attention_mask is None and model.pad_token_id is not None and (edges == model.pad_token_id).any():
        raise InputError("the prompts are padded and have no attention mask; give attention_mask")
    return present.to(model.device)


def _output(
    model: MaskedDiffusionModel, state: DiffusionState, tokenizer: PreTrainedTokenizerBase | None, start: float
) -> DiffusionOutput:
    spans = [slice(state.start, state.start + n) for n in state.gen_length.tolist()]
    windows = [row[span].tolist() for row, span in zip(state.x, spans)]
    eos = model.eos_token_id
    new_ids = [ids[: ids.index(eos)] if eos in ids else ids for ids in windows]
    stats = DiffusionStats(
        nfe=state.nfe.tolist(),
        tokens_processed=state.tokens_processed.tolist(),
        forward_calls=state.forward_calls,
        commit_step=[row[span].tolist() for row, span in zip(state.commit_step, spans)],
        commit_confidence=[row[span].tolist() for row, span in zip(state.commit_confidence, spans)],
        effective_tokens=[len(ids) for ids in new_ids],
        seconds=time.perf_counter() - start,
    )
    texts: Any = None
    if tokenizer is not None:
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in new_ids]
    prompts, present = state.x[:, : state.start], state.present[:, : state.start]
    return DiffusionOutput(
        sequences=state.x,
        new_ids=new_ids,
        prompt_ids=[row[real].tolist() for row, real in zip(prompts, present)],
        texts=texts,
        events=[],
        forward_calls=state.forward_calls,
        tokens_processed=sum(stats.tokens_processed),
        windows=windows,
        stats=stats,
    )
