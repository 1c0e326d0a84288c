"""The trainer of the values of dead ends.

Paper: Systematic Rectification of Language Models via Dead-end Analysis, arXiv 2302.14003.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback

from ...core.errors import InputError
from ...learned.dead_end_values import DeadEndValueModel
from ..contract import HouseConfig, MeanLossTrainer
from .collator import RectifierCollator
from .episodes import Episode, check_episodes
from .loss import sarsa_loss

__all__ = ["RectifierConfig", "RectifierTrainer"]


@dataclass
class RectifierConfig(HouseConfig):
    """`HouseConfig` with the terms of `sarsa_loss` and the published schedule."""

    gamma: float = field(default=1.0, metadata={"help": "discount from one token to the next"})
    q_min: float = field(default=-1.0, metadata={"help": "smallest target"})
    q_max: float = field(default=0.0, metadata={"help": "largest target"})
    target_update: float = field(default=0.1, metadata={"help": "share of the head that the averaged head takes over"})
    max_length: int = field(default=1024, metadata={"help": "tokens of an episode kept, from the right"})
    learning_rate: float = 3e-4
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 64
    warmup_steps: float = 500
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "target_update"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)} is not allowed; give a number in (0, 1]")
        if self.q_min >= self.q_max:
            raise InputError(f"q_min={self.q_min} is not below q_max={self.q_max}; give [-1, 0]")


class RectifierTrainer(MeanLossTrainer):
    """A `transformers.Trainer` for `DeadEndValueModel` on episodes (arXiv 2302.14003).

    Args:
        model: is bound to the tokenizer of `processing_class`.
        train_dataset, eval_dataset: episodes with prompt_ids, continuation_ids and reward (-1 for a text that ended
            undesired, 0 for another, or between).

    Raises:
        InputError: no tokenizer, no episodes, or some that `check_episodes` refuses.
    """

    def __init__(
        self,
        model: DeadEndValueModel,
        args: RectifierConfig,
        train_dataset: Sequence[Episode],
        eval_dataset: Sequence[Episode] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: RectifierCollator | None = None,
        **kwargs: Any,
    ) -> None:
        if processing_class is None:
            raise InputError("a rectifier is bound to a tokenizer; pass processing_class=tokenizer")
        if not len(train_dataset):
            raise InputError("there are no episodes to train on; sample some continuations")
        for episodes in (train_dataset, eval_dataset or ()):
            check_episodes(episodes, model.vocab_size)
        model.bind(processing_class)
        if data_collator is None:
            pad = processing_class.pad_token_id
            data_collator = RectifierCollator(pad or 0, args.max_length)  # masked, so any token will do
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class=processing_class, **kwargs
        )
        self.add_callback(_AverageHead())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        values = model(inputs["input_ids"], inputs["attention_mask"])
        terms = {name: getattr(self.args, name) for name in ("gamma", "q_min", "q_max")}
        loss = sarsa_loss(*values, inputs["input_ids"], inputs["rewards"], inputs["attention_mask"], **terms)
        return (loss, values) if return_outputs else loss


class _AverageHead(TrainerCallback):
    """Moves the averaged head after every optimiser step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.update_target(args.target_update)
