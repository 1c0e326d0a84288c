"""The trainer of token value models (arXiv 2407.12863)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...core.errors import InputError
from ...learned.token_values import TokenValueModel
from ...models.batch import pad_id, right_padded
from ..contract import HouseConfig, MeanLossTrainer
from .loss import ValueLoss, token_value_loss
from .solutions import ValueExample

__all__ = ["ValueCollator", "ValueConfig", "ValueTrainer", "value_errors"]


@dataclass
class ValueCollator:
    """Right-pads examples; `labels` (batch, time) are NaN at the question and at padding. Tokens beyond `max_length`
    are left out at the end: a value needs all that came before it."""

    pad_token_id: int
    max_length: int = 4096

    def __call__(self, examples: Sequence[ValueExample]) -> dict[str, Tensor]:
        rows = [[*e["prompt_ids"], *e["solution_ids"]][: self.max_length] for e in examples]
        ids, mask = right_padded(rows, self.pad_token_id)
        labels = torch.full(ids.shape, torch.nan)
        for line, example, row in zip(labels, examples, rows):
            start = len(example["prompt_ids"])
            own = example["labels"][: max(len(row) - start, 0)]
            line[start : start + len(own)] = torch.tensor(own)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


@dataclass
class ValueConfig(HouseConfig):
    """`HouseConfig` with the loss."""

    loss: str = field(default="mse", metadata={"help": "mse or bce"})
    max_length: int = field(default=4096, metadata={"help": "tokens of a question and solution that are kept"})
    learning_rate: float = 1e-5
    num_train_epochs: float = 2.0
    per_device_train_batch_size: int = 128
    warmup_steps: float = 0.05
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in get_args(ValueLoss):
            raise InputError(f"loss={self.loss!r} is unknown; use one of {', '.join(get_args(ValueLoss))}")
        if self.max_length < 2:
            raise InputError(f"max_length={self.max_length} is not allowed; give a number of tokens >= 2")


class ValueTrainer(MeanLossTrainer):
    """A `transformers.Trainer` of a `TokenValueModel`.

    Args:
        train_dataset, eval_dataset: examples with prompt_ids, solution_ids and labels, see `value_examples`.
        processing_class: the tokenizer of the ids.

    Raises:
        InputError: no tokenizer or another one than the model's, no examples, or labels that do not fit their tokens.
    """

    model: TokenValueModel
    args: ValueConfig
    data_collator: ValueCollator

    def __init__(
        self,
        model: TokenValueModel,
        args: ValueConfig,
        train_dataset: Sequence[ValueExample],
        eval_dataset: Sequence[ValueExample] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        if processing_class is None:
            raise InputError("values are those of a tokenizer's ids; pass processing_class=tokenizer")
        if not len(train_dataset):
            raise InputError("there are no solutions to train on; sample some")
        model.check(processing_class)
        for examples in (train_dataset, eval_dataset or ()):
            _check(examples, model.config.get_text_config().vocab_size, args.max_length)
        collator = ValueCollator(pad_id(processing_class), args.max_length)
        super().__init__(
            model, args, collator, train_dataset, eval_dataset, processing_class=processing_class, **kwargs
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        output = model(inputs["input_ids"], inputs["attention_mask"])
        loss = token_value_loss(output.logits[..., 0], inputs["labels"], cast(ValueLoss, self.args.loss))
        return (loss, output) if return_outputs else loss


def _check(examples: Sequence[ValueExample], vocabulary: int, longest: int) -> None:
    """Refuse examples that cannot be trained on, naming the first one."""
    for number, example in enumerate(examples):
        ids, labels = [*example["prompt_ids"], *example["solution_ids"]], example["labels"]
        if len(labels) != len(example["solution_ids"]) or not labels:
            raise InputError(
                f"example {number} has {len(labels)} labels for {len(example['solution_ids'])} tokens; give one for "
                "each token of a solution that has some"
            )
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise InputError(
                f"example {number} has ids from {min(ids)} to {max(ids)}, the model has {vocabulary} tokens; use its "
                "tokenizer"
            )
        if len(example["prompt_ids"]) >= longest:
            raise InputError(
                f"example {number} has a question of {len(example['prompt_ids'])} tokens, and max_length={longest} "
                "leaves none of its solution; raise it"
            )
        if any(label < 0 or label > 1 for label in labels):  # NaN is neither
            raise InputError(f"example {number} has labels from {min(labels)} to {max(labels)}; give [0, 1], or NaN")


@torch.no_grad()
def value_errors(
    model: TokenValueModel, examples: Sequence[ValueExample], collator: ValueCollator, batch_size: int = 64
) -> Tensor:
    """Squared errors of the value to the label at the first, middle and last token of each example, (examples, 3)."""
    found = []
    for start in range(0, len(examples), batch_size):
        batch = collator(examples[start : start + batch_size])
        labels = batch.pop("labels")
        values = model.score(**{name: part.to(model.device) for name, part in batch.items()}).cpu()
        for value, label in zip(values, labels):
            known = (~label.isnan()).nonzero()[:, 0]
            places = known[[0, len(known) // 2, -1]] if len(known) else []
            found.append((value - label)[places].square() if len(known) else torch.full((3,), torch.nan))
    return torch.stack(found)
