"""The trainer of one way of tuning: early stopping on files of the project that it does not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ...core.errors import InputError
from ...models.anatomy import fingerprint, vocabulary_size
from ...models.batch import pad_id, right_padded
from ..contract import HouseConfig, MeanLossTrainer
from .evaluation import Foretold, foretell, line_ends
from .files import SourceFile, tokens_of, windows
from .ways import Tuning, personalize, text_prefix, training_flops

__all__ = ["PersonalConfig", "PersonalizedTrainer", "mean_loss"]

FEWEST = 20  # windows worth learning from
VALIDATION = 9  # of this many files one is for validation, at least one


@dataclass
class PersonalConfig(HouseConfig):
    """`HouseConfig` with the constant learning rate, the windows and the patience of this trainer."""

    lr_scheduler_type: str = "constant"
    window: int = 512
    patience: int = 2
    text_start: bool = True


class PersonalizedTrainer(MeanLossTrainer):
    """Mean cross-entropy over all tokens of windows; the weights of the best epoch stay.

    Args:
        tuning: what is trained, see `personalize`.
        files: of the project, in random order; the first ninth of them is for validation.

    Attributes:
        made_for: name and fingerprint of the model before it was tuned.
        losses: validation loss before training and after each epoch.

    Raises:
        InputError: too few files or tokens, or a model that cannot be tuned in this way.
    """

    model: PreTrainedModel
    args: PersonalConfig

    def __init__(
        self,
        model: PreTrainedModel,
        config: PersonalConfig,
        tuning: Tuning,
        files: Sequence[SourceFile],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        first = max(1, len(files) // VALIDATION)
        held, kept = list(files[:first]), list(files[first:])
        pieces = windows(kept, config.window)
        check_sizes(model, config, tuning, kept, pieces)
        self.made_for = {"model": model.name_or_path, "fingerprint": fingerprint(model)}
        self.tuning, self.pad, self.tokens = tuning, pad_id(tokenizer), sum(map(len, pieces))
        start = text_prefix(model, tokens_of(kept, tuning.virtual_tokens)) if self._from_text(config) else None
        torch.manual_seed(config.seed)
        tuned = personalize(model, tuning, start)
        super().__init__(
            model=tuned,
            args=config,
            train_dataset=cast(Any, [{"ids": piece} for piece in pieces]),
            data_collator=self.collate,
            processing_class=tokenizer,
            callbacks=[KeepBest(self, windows(held, config.window))],
        )
        self.ends = line_ends(tokenizer, vocabulary_size(model))
        self.losses: list[float] = []

    def _from_text(self, config: PersonalConfig) -> bool:
        return self.tuning.way == "prefix" and config.text_start

    def collate(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        ids, present = right_padded([row["ids"] for row in rows], self.pad)
        return {
            "input_ids": ids,
            "attention_mask": present.long(),
            "labels": ids.masked_fill(~present, -100),
        }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Dropout acts where all weights are trained, and nowhere else: frozen layers would only be noisier."""
        if self.tuning.way != "custom":
            model.eval()
        outputs = model(**inputs, use_cache=False) if self.tuning.way != "prefix" else model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def foretell(self, files: Sequence[SourceFile]) -> list[Foretold]:
        """What the model makes of the windows of files; before training, without its prefix."""
        untrained = self.tuning.way == "prefix" and not self.state.global_step
        with cast(Any, self.model).disable_adapter() if untrained else nullcontext():
            return self.foretold(windows(files, self.args.window))

    def foretold(self, pieces: Sequence[Sequence[int]]) -> list[Foretold]:
        return foretell(self.model, pieces, self.ends, self.args.per_device_train_batch_size)

    @property
    def flops(self) -> float:
        """Operations of the training so far."""
        return training_flops(self.model, self.tuning, round(self.tokens * (self.state.epoch or 0)))


class KeepBest(TrainerCallback):
    """Stop when some epochs have brought nothing on validation windows, and go back to the best one."""

    def __init__(self, trainer: PersonalizedTrainer, pieces: list[list[int]]) -> None:
        self.trainer, self.pieces = trainer, pieces
        self.best: dict[str, Tensor] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._look()

    def on_epoch_end(self, args, state, control, **kwargs):
        self._look()
        losses = self.trainer.losses
        if len(losses) - 1 - losses.index(min(losses)) >= self.trainer.args.patience:
            control.should_training_stop = True

    @torch.no_grad()
    def on_train_end(self, args, state, control, **kwargs):
        for name, weight in self.trainer.model.named_parameters():
            if name in self.best:
                weight.copy_(self.best[name])

    def _look(self) -> None:
        trainer = self.trainer
        trainer.losses.append(mean_loss(trainer.foretold(self.pieces)))
        if trainer.losses[-1] == min(trainer.losses):
            weights = trainer.model.named_parameters()
            self.best = {name: weight.detach().clone() for name, weight in weights if weight.requires_grad}


def mean_loss(found: Sequence[Foretold]) -> float:
    """Nats per token."""
    return sum(one.nats for one in found) / sum(one.tokens for one in found)


def check_sizes(
    model: PreTrainedModel,
    config: PersonalConfig,
    tuning: Tuning,
    kept: Sequence[SourceFile],
    pieces: Sequence[Any],
) -> None:
    """Refuse what is too small to learn from, and windows that the model cannot read."""
    if not kept:
        raise InputError("there is only one file to learn from, and one is needed for validation; give more files")
    if len(pieces) < FEWEST:
        raise InputError(
            f"the project has {len(pieces)} windows of {config.window} tokens to learn from; give one with at least "
            f"{FEWEST}, or a smaller window"
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = config.window + (tuning.virtual_tokens if tuning.way == "prefix" else 0)
    if longest is not None and needed > longest:
        raise InputError(f"window and prefix take {needed} tokens, and this model reads {longest}; make them smaller")
