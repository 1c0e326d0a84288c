"""Which predictions of a block are already final: a small filter of confidences, and the traces that it learns from.

The stage decode collects the traces and uses the filter, the stage train fits it.

Paper: Learning to Parallel: Accelerating Diffusion Large Language Models via Adaptive Parallel Decoding (Learn2PD),
arXiv 2509.25188.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.artifact import Artifact, Folder, Header, MadeFor
from ..core.errors import InputError
from ..core.fields import Block, Width, check
from ..core.tensors import with_weights
from ..models.anatomy import fingerprint

__all__ = ["ConfidenceFilter", "TraceDataset"]


class TraceDataset(NamedTuple):
    """Steps of decoding, one a record, block by block.

    Attributes:
        conf: (records, block) probability of the best token of each position, float32; of what is committed too.
        label: (records, block) bool, whether that token is the final one.
        mask: (records, block) bool, what was still masked.
        prompt_id: (records,) the number of the prompt.
    """

    conf: Tensor
    label: Tensor
    mask: Tensor
    prompt_id: Tensor

    def take(self, records: Tensor) -> TraceDataset:
        """The records at these indices, or where a bool is True."""
        return TraceDataset(*(values[records] for values in self))

    @classmethod
    def join(cls, parts: list[TraceDataset]) -> TraceDataset:
        """The records of all parts."""
        return cls(*(torch.cat(values) for values in zip(*parts)))


class TrainedOn(MadeFor):
    """What a filter was trained on."""

    temperature: float


class FilterHeader(Header):
    """What a saved filter says of itself."""

    block_length: int = Field(ge=1, lt=2**20)
    hidden: int = Field(ge=1, lt=2**24)
    made_for: TrainedOn


class ConfidenceFilter(Artifact, nn.Module):
    """W2 relu(W1 c + b1) + b2 of the confidences c of a block: for each position, the logit of its being final.

    Args:
        block_length: positions of a block; confidences are in [0, 1] and in order.
        hidden: width of the hidden layer; None: as the block. 32 positions make 2,112 parameters.

    `made_for` says for which model it was trained, and at which temperature (see `bind`). Loaded, it is in eval mode.
    """

    kind = "filter"
    layout = Folder("filter.safetensors", "filter.json")
    fields = FilterHeader
    remedy = "give a folder written by ConfidenceFilter.save, or make one with `tokenry train --method learn2pd`"

    def __init__(self, block_length: int = 32, hidden: int | None = None) -> None:
        super().__init__()
        hidden = block_length if hidden is None else hidden
        if block_length < 1 or hidden < 1:
            raise InputError(f"block_length={block_length} and hidden={hidden} are not allowed; give numbers >= 1")
        check("block_length", block_length, Block)
        check("hidden", hidden, Width)
        self.block_length, self.hidden = block_length, hidden
        self.layers = nn.Sequential(nn.Linear(block_length, hidden), nn.ReLU(), nn.Linear(hidden, block_length))
        self.made_for: dict[str, Any] | None = None

    def forward(self, conf: Tensor) -> Tensor:
        """Logits (batch, block) of confidences (batch, block)."""
        if conf.shape[-1] != self.block_length:
            raise InputError(
                f"the filter was trained for blocks of {self.block_length}, not {conf.shape[-1]}; use "
                f"block_length={self.block_length}, or train a filter for the other length"
            )
        return self.layers(conf.float())

    # --- whom it belongs to ----------------------------------------------------------------------------------------

    def bind(self, model: PreTrainedModel) -> ConfidenceFilter:
        """Say that it was trained on what `model` is sure of, at temperature 0."""
        self.made_for = {
            "model": model.config._name_or_path,
            "fingerprint": fingerprint(model),
            "temperature": 0.0,
        }
        return self

    def check(self, model: PreTrainedModel, do_sample: bool = False) -> None:
        """Refuse a model that it was not trained for, and drawn tokens."""
        if do_sample:
            raise InputError("the filter was trained at temperature 0; decode with do_sample=False (--greedy)")
        if self.made_for is not None:
            self.check_made_for(fingerprint(model))

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        sizes = {"block_length": self.block_length, "hidden": self.hidden}
        return self.state_dict(), {**sizes, "made_for": self.made_for}

    @classmethod
    def restored(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> ConfidenceFilter:
        made = with_weights(lambda: cls(header["block_length"], header["hidden"]), tensors)
        made.made_for = header["made_for"]
        return made.eval()
