"""Learn2PD: a small trained filter says which predictions of a masked-diffusion model are final; the rest of the window
after the end of the text is cut off (EoTP).

Paper: Learning to Parallel: Accelerating Diffusion Large Language Models via Adaptive Parallel Decoding, arXiv
2509.25188. From the confidences of a block, two layers predict for each position whether the current prediction
already equals the final one. They learn it from an oracle that knows the answer of the plain decoder and commits
exactly what agrees with it (extremely greedy parallel decoding, EGP).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..core.artifact import ArtifactField
from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Block, Probability, Tokens
from ..learned.confidence_filter import ConfidenceFilter
from .contract import TraceMethod
from .denoising.blocks import block_values, in_columns
from .denoising.contract import DiffusionMethod, DiffusionParts
from .denoising.loop import LengthPolicy, MaskedDiffusionModel
from .denoising.oracle import EGPTraces
from .denoising.state import DiffusionState, Edit, Prediction
from .denoising.unmask import UnmaskPolicy, best_first

__all__ = ["EndOfTextTruncation", "Learn2PD", "LearnedFilter"]


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
    published: ClassVar[Claim] = Claim(
        "22.58", "times the throughput of one token per step", "LLaDA-8B-Instruct, GSM8K, length 1024, with EoTP"
    )

    tracer: ClassVar[type[TraceMethod]] = EGPTraces

    filter: ArtifactField[ConfidenceFilter] = Field(
        description="folder of a filter, or in Python the filter itself; `tokenry train --method learn2pd` makes one"
    )
    accept_threshold: float = Field(
        default=0.96, gt=0, lt=1, description="tokens more probably final than this are committed"
    )
    eotp: bool = Field(default=True, description="cut the window after the predicted end of the text")
    eotp_min_confidence: Probability = Field(
        default=0.0, description="least confidence of an end that is not committed; 0.9 is the safe choice"
    )
    min_per_step: Tokens = Field(default=1, description="most confident tokens that are committed in any case")
    block_length: Block = Field(default=32, description="tokens of a block; that of the filter")

    @model_validator(mode="before")
    @classmethod
    def _block_of_the_filter(cls, values: dict) -> dict:
        made = ConfidenceFilter.opened(values.get("filter"))
        if not isinstance(made, ConfidenceFilter):
            return values
        return {"block_length": made.block_length, **values, "filter": made}

    @model_validator(mode="after")
    def _same_block(self) -> Learn2PD:
        if self.filter.block_length != self.block_length:
            raise InputError(
                f"the filter was trained for blocks of {self.filter.block_length}, block_length is "
                f"{self.block_length}; leave it out, or train a filter for it"
            )
        return self

    def check(self, model: MaskedDiffusionModel, do_sample: bool) -> None:
        self.filter.check(model.model, do_sample)

    def parts(self, max_new_tokens: int) -> DiffusionParts:
        policy = LearnedFilter(self.filter, self.accept_threshold, self.min_per_step)
        length = EndOfTextTruncation(self.eotp_min_confidence) if self.eotp else None
        return DiffusionParts(unmask=policy, length=length)


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
