"""The trainer of several tasks, of which each step draws one."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ...core.errors import InputError
from ...models.batch import right_padded
from ..contract import HouseConfig, MeanLossTrainer
from .shared import SoftSharedLM
from .tasks import IGNORED, TASKS, Example

__all__ = ["CodeFillConfig", "MultiTaskTrainer", "check_task_probs"]

COMBINE = ("picked", "min", "sum")


@dataclass
class CodeFillConfig(HouseConfig):
    """`HouseConfig` with how tasks are drawn; `value_steps`, if given, sets the steps so that the task tvp gets that
    many, counting on its share."""

    task_probs: tuple[float, float, float] = field(
        default=(0.2, 0.4, 0.4), metadata={"help": f"of {', '.join(TASKS)}; they sum to 1"}
    )
    combine: str = field(
        default="picked", metadata={"help": "picked: a task a step; sum: all three; min: the one of smallest loss"}
    )
    value_steps: int = field(default=0, metadata={"help": "steps of the task tvp; 0: max_steps counts all steps"})
    learning_rate: float = 5e-4
    per_device_train_batch_size: int = 8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        check_task_probs(self.task_probs)
        if self.combine not in COMBINE:
            raise InputError(f"combine={self.combine!r} is not allowed; give {', '.join(COMBINE)}")
        if self.value_steps:
            share = self.task_probs[TASKS.index("tvp")] if self.combine == "picked" else 1.0
            if not share:
                raise InputError("value_steps needs the task tvp; give it a probability above 0, or max_steps")
            self.max_steps = math.ceil(self.value_steps / share - 1e-9)
        super().__post_init__()


def check_task_probs(probs: Sequence[float]) -> None:
    """Refuse what is no distribution over the tasks."""
    if len(probs) != len(TASKS) or not all(0 <= p <= 1 for p in probs) or not math.isclose(sum(probs), 1, abs_tol=1e-6):
        raise InputError(
            f"task_probs={','.join(map(str, probs))} is not allowed; give three numbers for {', '.join(TASKS)} that "
            "sum to 1"
        )


class MultiTaskTrainer(MeanLossTrainer):
    """A `transformers.Trainer` for `SoftSharedLM`: every step draws a task, a batch of it trains its model, and the
    penalty draws the models together (arXiv 2202.06689).

    Args:
        train_dataset: examples of the tasks, see `examples_of`.

    Raises:
        InputError: a task that can be drawn has no model or no example.
    """

    model: SoftSharedLM
    args: CodeFillConfig

    def __init__(
        self, model: SoftSharedLM, args: CodeFillConfig, train_dataset: Sequence[Example], **kwargs: Any
    ) -> None:
        rows: dict[str, list[int]] = defaultdict(list)
        for number, example in enumerate(train_dataset):
            rows[example["task"]].append(number)
        for task, share in zip(TASKS, args.task_probs):
            if share and (task not in model.models or task not in rows):
                what = "model" if task not in model.models else "example"
                raise InputError(f"the task {task!r} has no {what}; give it one, or a probability of 0")
        kwargs.setdefault("data_collator", collate)
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        self.rows = rows

    def get_train_dataloader(self) -> DataLoader:
        draws = _Draws(self.rows, self.args, self.args.train_batch_size)
        return self.accelerator.prepare(
            DataLoader(cast(Any, self.train_dataset), batch_sampler=draws, collate_fn=self.data_collator)
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        shared: SoftSharedLM = self.accelerator.unwrap_model(model)
        outputs = {task: model(task, **batch) for task, batch in cast(dict[str, dict[str, Any]], inputs).items()}
        losses = {task: output.loss for task, output in outputs.items()}
        if self.args.combine == "min":
            best = min(losses, key=lambda task: float(losses[task]))
            losses = {best: losses[best]}
        for task, loss in losses.items():
            shared.weigh(task, loss)
        total = torch.stack([loss + shared.penalty(task) for task, loss in losses.items()]).sum()
        return (total, outputs) if return_outputs else total


def collate(examples: Sequence[Example]) -> dict[str, dict[str, Tensor]]:
    """{task: its batch}, padded on the right; what is padded is not learned, and nothing before it sees it."""
    groups: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example["task"]].append(example)
    batches = {}
    for task, rows in groups.items():
        ids, _ = right_padded([row["input_ids"] for row in rows])
        labels, _ = right_padded([row["labels"] for row in rows], IGNORED)
        batches[task] = {"input_ids": ids, "labels": labels}
    return batches


class _Draws(Sampler[list[int]]):
    """The rows of each step: a batch of the task drawn, or of every task. The rows of a task come shuffled, all before
    one comes again; they and the tasks depend on the seed alone, and rows of a task not on the others."""

    def __init__(self, rows: Mapping[str, Sequence[int]], args: CodeFillConfig, size: int) -> None:
        self.rows, self.args, self.size = rows, args, size

    def __len__(self) -> int:
        return self.args.max_steps * self.args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[list[int]]:
        args, picks = self.args, random.Random(f"tasks {self.args.seed}")
        shares = {task: share for task, share in zip(TASKS, args.task_probs) if share}
        streams = {task: _endless(self.rows[task], random.Random(f"{task} {args.seed}")) for task in shares}
        for _ in range(len(self)):
            drawn = picks.choices([*shares], [*shares.values()]) if args.combine == "picked" else [*shares]
            yield [next(streams[task]) for task in drawn for _ in range(self.size)]


def _endless(rows: Sequence[int], rng: random.Random) -> Iterator[int]:
    while True:
        order = list(rows)
        rng.shuffle(order)
        yield from order
