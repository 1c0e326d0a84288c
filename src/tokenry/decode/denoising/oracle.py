"""An oracle that commits what agrees with the answer of the plain decoder, and the traces that a filter learns from.

Extremely greedy parallel decoding (EGP) of Learning to Parallel, arXiv 2509.25188.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.fields import Block
from ...core.progress import Progress
from ...learned.confidence_filter import TraceDataset
from ...models.prompts import encode_prompts
from ...text.words import listed
from ..contract import TraceMethod
from .blocks import block_values
from .loop import MaskedDiffusionModel, diffusion_generate
from .state import DiffusionState, Edit, Prediction
from .unmask import FixedCount, UnmaskPolicy

__all__ = ["EGPTraces", "OraclePolicy", "collect_egp_traces"]

UNKNOWN = -1  # no token


class OraclePolicy(UnmaskPolicy):
    """Exactly the predictions that agree with a known answer: the fewest steps that a filter could need (EGP).

    Where a block is stuck, its predictions being those of the step before, the rest of it is copied from the answer. So
    the answer comes out whatever the model predicts.

    Args:
        reference: (batch, gen_length) the answers, such as the windows of the plain decoder.

    Raises:
        InputError: when a generation starts, windows of another shape.
    """

    answer: Tensor  # (batch, time) the reference in its columns
    before: Tensor  # (batch, time) what the step before predicted

    def __init__(self, reference: Tensor) -> None:
        self.reference = reference

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
    progress: Progress | None = None,
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
    options: dict[str, Any] = {"gen_length": gen_length, "block_length": block_length}
    steps = []
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

    block_length: Block = Field(default=32, description="tokens of a block; that of the filter to train")

    def collect(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        chat: bool = True,
    ) -> TraceDataset:
        widths: dict[str, Any] = {"gen_length": max_new_tokens, "block_length": self.block_length}
        return collect_egp_traces(model, tokenizer, prompts, chat=chat, batch_size=len(prompts), **widths)
