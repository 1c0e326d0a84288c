"""The trainer of a filter of confidences, on traces that it splits by prompt.

Paper: Learning to Parallel (Learn2PD), arXiv 2509.25188.
"""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput

from ...core.errors import InputError
from ...core.progress import Progress
from ...learned.confidence_filter import ConfidenceFilter, TraceDataset
from .loss import filter_loss, filter_report

__all__ = ["FilterTrainer", "SplitBy", "split_traces", "train_filter"]

SplitBy = Literal["prompt", "step"]
FEWEST = 50  # records worth learning from
CHECK_EVERY, PATIENCE = 20, 15  # epochs from one look at the validation loss to the next; looks without progress


def split_traces(
    traces: TraceDataset, split_by: SplitBy = "prompt", seed: int = 0
) -> tuple[TraceDataset, TraceDataset, TraceDataset]:
    """For training, validation and test: 80, 10 and 10 % of the prompts, or of the records.

    Steps of one prompt are alike, so records of the same prompts in training and test make a filter look better than it
    is ("step", the official split).

    Raises:
        InputError: fewer than 3 prompts or records.
    """
    if split_by not in ("prompt", "step"):
        raise InputError(f"split_by={split_by!r} is unknown; use 'prompt' or 'step'")
    groups = traces.prompt_id if split_by == "prompt" else torch.arange(len(traces.conf))
    names = groups.unique()
    if len(names) < 3:
        raise InputError(f"the traces are of {len(names)} {split_by}s and cannot be split in three; collect more")
    order = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
    few = max(1, len(names) // 10)
    parts = (order[2 * few :], order[:few], order[few : 2 * few])
    training, validation, test = (traces.take(torch.isin(groups, part)) for part in parts)
    return training, validation, test


def check_traces(traces: TraceDataset, mask_loss: bool = False) -> None:
    """Refuse traces that no filter can learn from."""
    if len(traces.conf) < FEWEST:
        raise InputError(f"there are {len(traces.conf)} traces; collect at least {FEWEST}, from more prompts")
    if not bool(((traces.conf >= 0) & (traces.conf <= 1)).all()):
        raise InputError("confidences outside [0, 1] are not allowed; give probabilities")
    labels = traces.label[traces.mask] if mask_loss else traces.label
    if bool(labels.all()) or not bool(labels.any()):
        raise InputError(
            f"all predictions are {'' if bool(labels.any()) else 'not '}final, so there is nothing to tell apart; use "
            "other prompts, or a wider window"
        )


class FilterTrainer:
    """AdamW on all training records at once; it stops when the validation loss does, and keeps the best filter.

    Args:
        traces: are split here, see `split_traces`.
        epochs: at most that many.
        lr: learning rate.
        mask_loss: learn from masked positions alone. The official loss is over all, most of which are committed.
        hidden: width of the filter's hidden layer; None: as the block.
        accept_threshold: of the report.
        seed: of the split and the first weights.
        progress: called with (epochs done, epochs).

    Attributes:
        filter: what is trained, at first an `untrained` one.
        state: `global_step` counts the epochs.

    Raises:
        InputError: a number out of range, too few traces, or only one class.
    """

    untrained: ClassVar[type[ConfidenceFilter]] = ConfidenceFilter

    def __init__(
        self,
        traces: TraceDataset,
        *,
        epochs: int = 2000,
        lr: float = 3e-3,
        split_by: SplitBy = "prompt",
        mask_loss: bool = False,
        hidden: int | None = None,
        accept_threshold: float = 0.96,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        if epochs < 1 or not 0 < lr < float("inf"):
            raise InputError(f"epochs={epochs} and lr={lr} are not allowed; give epochs >= 1 and a rate > 0")
        check_traces(traces, mask_loss)
        self.epochs, self.lr, self.mask_loss, self.progress = epochs, lr, mask_loss, progress
        self.accept_threshold = accept_threshold
        self.training, self.validation, self.test = split_traces(traces, split_by, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.filter = self.untrained(traces.conf.shape[1], hidden)
        self.state = TrainerState()

    def train(self) -> TrainOutput:
        """Train; the filter is in eval mode and at its best afterwards."""
        start, optimizer = time.perf_counter(), torch.optim.AdamW(self.filter.parameters(), lr=self.lr)
        best, kept, waited = self._validation_loss(), _copy(self.filter), 0
        for epoch in range(1, self.epochs + 1):
            optimizer.zero_grad()
            filter_loss(self.filter, self.training, self.mask_loss).backward()
            optimizer.step()
            self.state.global_step = epoch
            if epoch % CHECK_EVERY and epoch < self.epochs:
                continue
            if self.progress:
                self.progress(epoch, self.epochs)
            loss = self._validation_loss()
            waited = 0 if loss < best else waited + 1
            if loss < best:
                best, kept = loss, _copy(self.filter)
            if waited == PATIENCE:
                break
        self.filter.load_state_dict(kept)
        self.filter.eval()
        return TrainOutput(self.state.global_step, best, {"train_runtime": time.perf_counter() - start})

    def report(self) -> dict[str, float]:
        """See `filter_report`, on the traces kept for testing."""
        return filter_report(self.filter, self.test, self.accept_threshold, self.mask_loss)

    @torch.no_grad()
    def _validation_loss(self) -> float:
        return float(filter_loss(self.filter, self.validation, self.mask_loss))


def _copy(made: ConfidenceFilter) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.state_dict().items()}


def train_filter(traces: TraceDataset, **options: Any) -> tuple[ConfidenceFilter, dict[str, float]]:
    """A filter and its `filter_report`; options are those of `FilterTrainer`. Bind it to its model before saving it."""
    trainer = FilterTrainer(traces, **options)
    trainer.train()
    return trainer.filter, trainer.report()
