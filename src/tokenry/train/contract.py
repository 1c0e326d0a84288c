"""What a train method is: what it reads from a file, how it trains, what it measures and what it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from pydantic import ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..core.fields import Share
from ..core.method import Method
from ..core.progress import Progress
from ..core.schemas import Exchanged

__all__ = ["HouseConfig", "MeanLossTrainer", "TrainAnswer", "TrainMethod", "TrainRequest", "report_progress"]


class TrainRequest(Exchanged):
    """What is learned from, and where the result goes."""

    data: str = Field(description="file with what is learned from")
    output: str = Field(description="new folder for what is trained")
    hold_out: Share = Field(default=0.1, description="share of the examples that is only measured")


class TrainAnswer(Exchanged):
    """What was trained, with the method's measures before and after; the number of examples stands under their name."""

    model_config = ConfigDict(extra="allow")

    held_out: int = Field(ge=0)
    steps: int = Field(ge=0)
    seconds: float = Field(ge=0)
    before: dict[str, float]
    after: dict[str, float]
    output: str


class TrainMethod(Method):
    """A method of the train stage.

    Class attributes: `examples` (what it learns from, in the plural), `data` (the file that holds them), `takes_folder`
    (whether it may be a folder, too), `measures` ({name: what `score` means by it}), `costs_named` (what `costs`
    tells), `next_step` (the command that uses the result; {output} and {model} are filled in).
    """

    stage: ClassVar[str] = "train"
    input: ClassVar[type[Exchanged]] = TrainRequest
    output: ClassVar[type[Exchanged]] = TrainAnswer
    examples: ClassVar[str]
    data: ClassVar[str] = "a file of JSON lines"
    takes_folder: ClassVar[bool] = False
    measures: ClassVar[dict[str, str]]
    costs_named: ClassVar[tuple[str, ...]] = ()
    next_step: ClassVar[str]

    def variants(self) -> list[Self]:
        """What is trained with these options, each by itself and from the same model."""
        return [self]

    @property
    def label(self) -> str:
        """What tells it from the other variants."""
        return self.slug

    def read(self, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[Any]:
        """The examples in a file, in random order, so that the first ones can be held out."""
        raise NotImplementedError

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Any],
        output_dir: str | Path,
        progress: Progress | None = None,
    ) -> Trainer:
        """A trainer for the examples; call its `train()`.

        Args:
            progress: called with (steps done, steps); nothing is printed then.
        """
        raise NotImplementedError

    def score(self, trainer: Trainer, examples: Sequence[Any]) -> dict[str, float]:
        """The `measures` of what is being trained, at these examples."""
        raise NotImplementedError

    def costs(self, trainer: Trainer) -> dict[str, float]:
        """What training and its result cost beside seconds, by `costs_named`, once it is done."""
        return {}

    def save(self, trainer: Trainer, folder: Path) -> None:
        """Write what was trained into a folder."""
        raise NotImplementedError


@dataclass
class HouseConfig(TrainingArguments):
    """`TrainingArguments` with what all trainers here want: nothing is saved or reported on the way, and the collator
    gets every column of the examples."""

    lr_scheduler_type: str = "linear"
    save_strategy: str = "no"
    report_to: str = "none"
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    remove_unused_columns: bool = False


class MeanLossTrainer(Trainer):
    """A `transformers.Trainer` whose `compute_loss` is a mean of its own, whatever the accumulation, and is all that
    evaluation looks at."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss = cast(Tensor, self.compute_loss(model, self._prepare_inputs(inputs)))
        return loss.detach(), None, None


def report_progress(trainer: Trainer, progress: Progress) -> None:
    """Make a trainer call `progress` after every step instead of printing."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Progress(progress))


class _Progress(TrainerCallback):
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_step_end(self, args, state, control, **kwargs):
        self.progress(state.global_step, state.max_steps)
