"""`SkipDecodeTrainer` and its config: the loss of trl's `SFTTrainer`, with every token as deep as it will be decoded.

Paper: SkipDecode, arXiv 2307.02628. Layers compute all columns and a mask chooses, so a step saves no more than the
layers beyond `e_max`; see `tokenry.hooks.skip_schedule.skip_forward`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.errors import InputError
from ..hooks.layers import mask_layers
from ..hooks.skip_schedule import Kind, SkipSchedule
from ..models.anatomy import decoder_layers

try:
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]  # they are public there
except ModuleNotFoundError:
    raise InputError("SkipDecodeTrainer needs the package trl; run `pip install tokenry[train]`") from None

__all__ = ["SkipDecodeConfig", "SkipDecodeTrainer"]


class SkipDecodeTrainer(SFTTrainer):
    """A trl `SFTTrainer` whose forward skips layers (arXiv 2307.02628). At full depth the loss is its parent's.

    A row's prompt is what comes before its first label; a text without a prompt begins at once.

    Raises:
        InputError: a schedule that the model has no layers for, LayerDrop, or a router's auxiliary loss.
    """

    model: PreTrainedModel
    args: SkipDecodeConfig

    def __init__(self, model: Any, args: SkipDecodeConfig, *further: Any, **kwargs: Any) -> None:
        super().__init__(model, args, *further, **kwargs)
        self.schedule = SkipSchedule(
            len(decoder_layers(self.model)),
            args.e_max,
            args.e_min,
            args.warmup,
            planned_new_tokens=args.planned_new_tokens,
            kind=cast(Kind, args.schedule),  # others are refused
            power=args.power,
        )
        if getattr(self.model.config, "layerdrop", 0):
            raise InputError(
                f"layerdrop={self.model.config.layerdrop} leaves out layers at random beside the schedule; load the "
                "model with layerdrop=0"
            )
        if self.aux_loss_enabled:
            raise InputError(
                "the router's auxiliary loss counts layers that did not run; set output_router_logits=False"
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with mask_layers(self.accelerator.unwrap_model(model), self.executed(inputs["labels"])):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def executed(self, labels: Tensor) -> Tensor:
        """Boolean (layers, batch, columns): what runs, in this step, for rows with these labels."""
        learned = labels != -100
        prompt = torch.where(learned.any(1), learned.int().argmax(1), labels.shape[1])
        column = torch.arange(labels.shape[1], device=labels.device)
        return self.step_schedule().executed(column - prompt[:, None])

    def step_schedule(self) -> SkipSchedule:
        """The schedule, in training with the smallest depth drawn for this optimiser step if that is wanted."""
        if not (self.args.sample_e_min and self.model.training):
            return self.schedule
        rng = random.Random(f"{self.args.seed} {self.state.global_step}")
        # the schedule has filled in what was none
        least, most = cast(tuple[int, int], (self.schedule.e_min, self.schedule.e_max))
        return replace(self.schedule, e_min=rng.randint(least, most))


@dataclass
class SkipDecodeConfig(SFTConfig):
    """`SFTConfig` with the schedule that the model will be decoded with; see `SkipSchedule`."""

    e_max: int | None = field(default=None, metadata={"help": "layers of the prompt and the first token; none: all"})
    e_min: int | None = field(default=None, metadata={"help": "layers of the last planned token; none: half"})
    warmup: int = field(default=2, metadata={"help": "first layers that always run"})
    schedule: str = field(default="linear", metadata={"help": "how depth falls: linear, constant or power"})
    power: float = field(default=2.0, metadata={"help": "exponent of the schedule 'power'"})
    planned_new_tokens: int = field(default=256, metadata={"help": "new tokens after which e_min is reached"})
    sample_e_min: bool = field(
        default=False, metadata={"help": "draw the smallest depth of every step from e_min to e_max"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing or self.padding_free:
            raise InputError(
                "packing puts several texts into a row, and depth follows the column; set packing=False and "
                "padding_free=False"
            )
        if self.ddp_find_unused_parameters is None:  # layers beyond `e_max` do not run, and have no gradient
            self.ddp_find_unused_parameters = True
