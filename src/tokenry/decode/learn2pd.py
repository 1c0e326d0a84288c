"""Learn2PD: a small trained filter says which predictions of a masked-diffusion model are final; the rest of the window
after the end of the text is cut off (EoTP).

Paper: Learning to Parallel: Accelerating Diffusion Large Language Models via Adaptive Parallel Decoding, arXiv
2509.25188. From the confidences of a block, two layers predict for each position whether the current prediction
already equals the final one. They learn it from an oracle that knows the answer of the plain decoder and commits
exactly what agrees with it (extremely greedy parallel decoding, EGP).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.fields import Block, Probability, Tokens
from ..learned.confidence_filter import ConfidenceFilter, TraceDataset
from ..models.prompts import encode_prompts
from ..text.words import listed
from .contract import TraceMethod
from .denoising.contract import DiffusionMethod, DiffusionParts
from .denoising.loop import LengthPolicy, MaskedDiffusionModel, diffusion_generate
from .denoising.state import DiffusionState, Edit, Prediction
from .denoising.unmask import FixedCount, UnmaskPolicy, best_first

__all__ = ["EGPTraces", "EndOfTextTruncation", "Learn2PD", "LearnedFilter", "OraclePolicy", "collect_egp_traces"]

UNKNOWN = -1  # no token


# --- blocks --------------------------------------------------------------------------------------------------------


def block_values(values: Tensor, state: DiffusionState, length: int, fill: float | int | bool) -> Tensor:
    """What (batch, time) has in each row's block: (batch, length), with `fill` where a block is shorter."""
    columns = _block_columns(state, length)
    found = F.pad(values, (0, length), value=fill).gather(1, columns)
    return found.masked_fill(columns >= state.block_end[:, None], fill)


def in_columns(chosen: Tensor, state: DiffusionState) -> Tensor:
    """The positions of each row's block (batch, length) that are True, as columns (batch, time)."""
    length = chosen.shape[1]
    whole = F.pad(torch.zeros_like(state.present), (0, length))
    return whole.scatter(1, _block_columns(state, length), chosen)[:, :-length] & state.in_block


def _block_columns(state: DiffusionState, length: int) -> Tensor:
    return state.block_start[:, None] + torch.arange(length, device=state.x.device)


# --- what is committed ---------------------------------------------------------------------------------------------


class LearnedFilter(UnmaskPolicy):
    """All that the filter takes for final, and the most confident ones (Learn2PD, arXiv 2509.25188).

    The filter sees the confidences of the whole block, also of what is committed; a block that is shorter than the
    filter is filled up with confidence 1.

    Args:
        filter: for blocks of the length that is decoded with.
        accept_threshold: committed is what the filter gives a higher probability of being final, in (0, 1).
        min_per_step: that many of the most confident predictions are committed in any case.

    Raises:
        InputError: a parameter out of range; when a generation starts, blocks of another length.
    """

    def __init__(self, filter: ConfidenceFilter, accept_threshold: float = 0.96, min_per_step: int = 1) -> None:
        if not 0 < accept_threshold < 1:
            raise InputError(f"accept_threshold={accept_threshold} is not allowed; give a probability in (0, 1)")
        if min_per_step < 1:
            raise InputError(f"min_per_step={min_per_step} is not allowed; give a number >= 1")
        self.filter, self.accept_threshold, self.min_per_step = filter.eval(), accept_threshold, min_per_step

    def reset(self, state: DiffusionState) -> None:
        lengths = state.gen_length.clamp(max=state.block_length)  # the window may be one block
        length = int(lengths[(lengths != self.filter.block_length).long().argmax()])
        if self.filter.block_length not in (state.block_length, length):
            raise InputError(
                f"the filter was trained for blocks of {self.filter.block_length}, the window has blocks of "
                f"{length}; use block_length={self.filter.block_length}, or train a filter for the other "
                "length"
            )
        self.filter.to(state.x.device)

    @torch.no_grad()
    def select(self, prediction: Prediction, state: DiffusionState) -> Tensor:
        conf = block_values(prediction.confidence, state, self.filter.block_length, 1.0)
        final = in_columns(self.filter(conf).sigmoid() > self.accept_threshold, state)
        candidates = state.candidates
        return candidates & (final | (best_first(prediction.confidence, candidates) < self.min_per_step))


class OraclePolicy(UnmaskPolicy):
    """Exactly the predictions that agree with a known answer: the fewest steps that a filter could need (EGP).

    Where a block is stuck, its predictions being those of the step before, the rest of it is copied from the answer. So
    the answer comes out whatever the model predicts.

    Args:
        reference: (batch, gen_length) the answers, such as the windows of the plain decoder.

    Raises:
        InputError: when a generation starts, windows of another shape.
    """

    def __init__(self, reference: Tensor) -> None:
        self.reference = reference
        self.answer: Tensor | None = None  # (batch, time) the reference in its columns
        self.before: Tensor | None = None  # (batch, time) what the step before predicted

    def reset(self, state: DiffusionState) -> None:
        windows = (len(state.x), state.x.shape[1] - state.start)
        if tuple(self.reference.shape) != windows:
            raise InputError(
                f"the reference has shape {tuple(self.reference.shape)}, the windows {windows}; give a row of ids for "
                "each window"
            )
        self.answer = F.pad(self.reference.to(state.x.device), (state.start, 0), value=UNKNOWN)
        self.before = torch.full_like(self.answer, UNKNOWN)

    def reindex(self, edit: Edit) -> None:
        self.answer, self.before = edit.take(self.answer, UNKNOWN), edit.take(self.before, UNKNOWN)

    def select(self, prediction: Prediction, state: DiffusionState) -> Tensor:
        predicted = prediction.tokens.clone()
        same = (predicted == self.before) | ~state.in_block
        stuck = state.candidates & (same.all(1) & (state.block_step > 0))[:, None]
        self.before = predicted
        # The loop writes what is predicted, so the copy goes there.
        prediction.tokens[stuck] = self.answer[stuck]
        return state.candidates & (prediction.tokens == self.answer)


# --- where the window ends -----------------------------------------------------------------------------------------


class EndOfTextTruncation(LengthPolicy):
    """Cuts each window after the end of the text, once that is predicted (EoTP, arXiv 2509.25188).

    If end-of-text tokens are committed in a step, the window ends after the first of them; else after the mask whose
    most likely token is end-of-text with the highest confidence, if there is one.

    Args:
        min_confidence: what that mask must reach, in [0, 1]; 0 is the published rule. A model that guesses an early end
            in a wide window loses the answer there, which 0.9 prevents.

    Raises:
        InputError: min_confidence out of range; when a generation starts, a model without end-of-text token.
    """

    def __init__(self, min_confidence: float = 0.0) -> None:
        if not 0 <= min_confidence <= 1:
            raise InputError(f"min_confidence={min_confidence} is not allowed; give a probability in [0, 1]")
        self.min_confidence = min_confidence
        self.end_of_text: int | None = None

    def initial(self, model: MaskedDiffusionModel, state: DiffusionState) -> None:
        if model.eos_token_id is None:
            raise InputError("the model has no end-of-text token to cut windows at; give eos_token_id, or eotp=False")
        self.end_of_text = model.eos_token_id

    def edit(self, prediction: Prediction, commit: Tensor, state: DiffusionState) -> Edit | None:
        ends = prediction.tokens == self.end_of_text
        committed = ends & commit
        guessed = ends & state.masked & (prediction.confidence >= self.min_confidence)
        surest = prediction.confidence.masked_fill(~guessed, -1.0).argmax(1)
        # int, since argmax takes no bool; of equal numbers it gives the first.
        last = torch.where(committed.any(1), committed.int().argmax(1), surest)
        # A row that is done, or waits for the batch, is predicted once more than it would be alone.
        found = (committed | guessed).any(1) & state.working
        width = torch.where(found, last + 1 - state.start, state.gen_length)
        return None if torch.equal(width, state.gen_length) else Edit.resize(state, width)


# --- traces --------------------------------------------------------------------------------------------------------


class _TracedOracle(OraclePolicy):
    """Keeps what a filter could have seen in each step, and what it should have said."""

    def __init__(self, reference: Tensor, block_length: int, first_prompt: int) -> None:
        super().__init__(reference)
        self.block_length, self.first_prompt = block_length, first_prompt
        self.steps: list[TraceDataset] = []

    def select(self, prediction: Prediction, state: DiffusionState) -> Tensor:
        rows, length = state.working, self.block_length
        conf = block_values(prediction.confidence, state, length, 1.0)
        label = block_values(prediction.tokens == self.answer, state, length, True)
        mask = block_values(state.masked, state, length, False)
        number = self.first_prompt + torch.arange(len(rows), device=rows.device)
        step = TraceDataset(conf, label, mask, number).take(rows)
        self.steps.append(TraceDataset(*(values.cpu() for values in step)))
        return super().select(prediction, state)


def collect_egp_traces(
    model: PreTrainedModel | MaskedDiffusionModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    gen_length: int = 32,
    block_length: int = 32,
    temperature: float = 0.0,
    chat: bool = True,
    batch_size: int = 32,
    progress: Callable[[int, int], None] | None = None,
) -> TraceDataset:
    """Decode each prompt one token per step, then again with the oracle that knows the result, and keep its steps.

    Args:
        gen_length: width of the windows, a multiple of `block_length`.
        block_length: that of the filter to train.
        temperature: 0, since a filter is trained on the most likely tokens.
        progress: called with (prompts done, all prompts).

    Raises:
        InputError: no prompts, temperature above 0, a window that is no multiple of the block.
    """
    if temperature != 0:
        raise InputError(f"temperature={temperature} is not allowed; traces are collected at temperature 0")
    if gen_length < block_length or gen_length % block_length:
        raise InputError(
            f"gen_length={gen_length} is not a multiple of block_length={block_length}; change one of them"
        )
    prompts = listed(prompts, "prompt")
    if not prompts:
        raise InputError("there are no prompts to collect traces from; give some")
    if not isinstance(model, MaskedDiffusionModel):
        model = MaskedDiffusionModel(model, tokenizer)
    options, steps = {"gen_length": gen_length, "block_length": block_length}, []
    for start in range(0, len(prompts), batch_size):
        inputs = encode_prompts(tokenizer, prompts[start : start + batch_size], chat).to(model.device)
        plain = diffusion_generate(model, **inputs, unmask=FixedCount(), **options)
        oracle = _TracedOracle(torch.tensor(plain.windows), block_length, start)
        diffusion_generate(model, **inputs, unmask=oracle, **options)
        steps += oracle.steps
        if progress:
            progress(min(start + batch_size, len(prompts)), len(prompts))
    return TraceDataset.join(steps)


class EGPTraces(TraceMethod):
    """What a filter is trained on: see `collect_egp_traces`."""

    slug: ClassVar[str] = "learn2pd"

    block_length: Block = Field(32, description="tokens of a block; that of the filter to train")

    def collect(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        chat: bool = True,
    ) -> TraceDataset:
        widths = {"gen_length": max_new_tokens, "block_length": self.block_length}
        return collect_egp_traces(model, tokenizer, prompts, chat=chat, batch_size=len(prompts), **widths)


# --- the method ----------------------------------------------------------------------------------------------------


class Learn2PD(DiffusionMethod):
    """A trained filter for what is committed, and the end of the text as the end of the window."""

    slug: ClassVar[str] = "learn2pd"
    title: ClassVar[str] = "Learn2PD"
    paper: ClassVar[str] = (
        "Learning to Parallel: Accelerating Diffusion Large Language Models via Adaptive Parallel Decoding, arXiv "
        "2509.25188"
    )
    claim: ClassVar[str] = (
        "A tiny filter that has learned from the confidences of a block which predictions are final decodes "
        "masked-diffusion models in a fraction of the forward passes, at the same quality."
    )

    tracer: ClassVar[type[TraceMethod]] = EGPTraces

    filter: str = Field(description="folder of a filter; `tokenry train --method learn2pd` makes one")
    accept_threshold: float = Field(0.96, gt=0, lt=1, description="tokens more probably final than this are committed")
    eotp: bool = Field(True, description="cut the window after the predicted end of the text")
    eotp_min_confidence: Probability = Field(
        0.0, description="least confidence of an end that is not committed; 0.9 is the safe choice"
    )
    min_per_step: Tokens = Field(1, description="most confident tokens that are committed in any case")
    block_length: Block = Field(32, description="tokens of a block; that of the filter")

    @model_validator(mode="before")
    @classmethod
    def _block_of_the_filter(cls, values: dict) -> dict:
        if not isinstance(values.get("filter"), str):
            return values
        return {"block_length": ConfidenceFilter.from_pretrained(values["filter"]).block_length, **values}

    _made: ConfidenceFilter = PrivateAttr()

    @model_validator(mode="after")
    def _same_block(self) -> Learn2PD:
        self._made = ConfidenceFilter.from_pretrained(self.filter)
        if self._made.block_length != self.block_length:
            raise InputError(
                f"the filter was trained for blocks of {self._made.block_length}, block_length is {self.block_length}; "
                "leave it out, or train a filter for it"
            )
        return self

    def check(self, model: MaskedDiffusionModel, do_sample: bool) -> None:
        self._made.check(model.model, do_sample)

    def parts(self, max_new_tokens: int) -> DiffusionParts:
        policy = LearnedFilter(self._made, self.accept_threshold, self.min_per_step)
        length = EndOfTextTruncation(self.eotp_min_confidence) if self.eotp else None
        return DiffusionParts(unmask=policy, length=length)
