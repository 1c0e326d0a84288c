"""Training the filter of Learn2PD: which predictions of a masked-diffusion model are final, learned from traces.

Paper: Learning to Parallel: Accelerating Diffusion Large Language Models via Adaptive Parallel Decoding, arXiv
2509.25188. A trace is decoded with an oracle that commits exactly what agrees with the plain decoder's answer; each of
its steps shows the confidences of a block and which of the predictions were final. Prompts are all it takes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from transformers.trainer_utils import TrainOutput

from .. import catalog
from ..core.errors import InputError
from ..core.fields import Batch, Block, Count, Rate, Seed, Tokens, Width
from ..core.files import read_records
from ..learned.confidence_filter import ConfidenceFilter, TraceDataset
from ..text.words import listed
from .contract import TrainMethod

__all__ = ["FilterTrainer", "Learn2PDTraining", "filter_report", "split_traces", "train_filter"]

SplitBy = Literal["prompt", "step"]
FEWEST = 50  # records worth learning from
CHECK_EVERY, PATIENCE = 20, 15  # epochs from one look at the validation loss to the next; looks without progress
BINS = 10  # of probabilities, in the calibration error


# --- loss and report -----------------------------------------------------------------------------------------------


def filter_loss(made: ConfidenceFilter, traces: TraceDataset, mask_loss: bool = False) -> Tensor:
    """Mean binary cross-entropy over positions; with `mask_loss` over those that were masked."""
    losses = F.binary_cross_entropy_with_logits(made(traces.conf), traces.label.float(), reduction="none")
    return losses[traces.mask].mean() if mask_loss else losses.mean()


@torch.no_grad()
def filter_report(
    made: ConfidenceFilter, traces: TraceDataset, accept_threshold: float = 0.96, mask_loss: bool = False
) -> dict[str, float]:
    """What a filter is worth on traces, at the positions that were masked.

    Returns:
        loss: see `filter_loss`.
        false_positives: share of the accepted predictions that are not final.
        false_negatives: share of the final predictions that are not accepted.
        calibration: mean distance of the predicted probability from the share that is final, over ten bins (ECE).
        accepted: share of the predictions that are accepted.
    """
    probability, final = made(traces.conf).sigmoid()[traces.mask], traces.label[traces.mask]
    accepted = probability > accept_threshold
    bins = (probability * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS).index_add(0, bins, probability - final.float())
    return {
        "loss": float(filter_loss(made, traces, mask_loss)),
        "false_positives": _share(accepted & ~final, accepted),
        "false_negatives": _share(final & ~accepted, final),
        "calibration": float(gaps.abs().sum() / len(final)),
        "accepted": _share(accepted, torch.ones_like(accepted)),
    }


def _share(part: Tensor, whole: Tensor) -> float:
    return int(part.sum()) / max(1, int(whole.sum()))


# --- training ------------------------------------------------------------------------------------------------------


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
    return tuple(traces.take(torch.isin(groups, part)) for part in parts)


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
        progress: called with completed=epochs, total=epochs.
        collect: gives the traces of other prompts, to measure on.

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
        progress: Callable[..., None] | None = None,
        collect: Callable[[tuple[str, ...]], TraceDataset] | None = None,
    ) -> None:
        if epochs < 1 or not 0 < lr < float("inf"):
            raise InputError(f"epochs={epochs} and lr={lr} are not allowed; give epochs >= 1 and a rate > 0")
        check_traces(traces, mask_loss)
        self.epochs, self.lr, self.mask_loss, self.progress = epochs, lr, mask_loss, progress
        self.accept_threshold, self.collect = accept_threshold, collect
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
                self.progress(completed=epoch, total=self.epochs)
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


# --- the method ----------------------------------------------------------------------------------------------------


class Learn2PDTraining(TrainMethod):
    """Learn from a model's own decoding which of its predictions are final."""

    slug: ClassVar[str] = "learn2pd"
    title: ClassVar[str] = "Learn2PD filter"
    paper: ClassVar[str] = (
        "Learning to Parallel: Accelerating Diffusion Large Language Models via Adaptive Parallel Decoding, arXiv "
        "2509.25188"
    )
    claim: ClassVar[str] = (
        "Two small layers learn from the confidences of a block which predictions of a masked-diffusion model are "
        "final."
    )
    examples: ClassVar[str] = "prompts"
    measures: ClassVar[dict[str, str]] = {
        "loss": "binary cross-entropy",
        "false_positives": "share of accepted predictions that are not final",
        "false_negatives": "share of final predictions not accepted",
        "calibration": "calibration error",
        "accepted": "share of predictions that are accepted",
    }
    next_step: ClassVar[str] = "tokenry decode --method learn2pd -o filter={output} --model {model} --greedy PROMPT"

    block_length: Block = Field(32, description="tokens of a block; the filter is tied to it")
    gen_length: Tokens = Field(32, description="width of the windows of the traces, a multiple of the block")
    hidden: Width | None = Field(None, description="width of the filter's hidden layer; default: as the block")
    epochs: Count = Field(2000, description="most passes over the traces; it stops when validation does")
    lr: Rate = Field(3e-3, description="learning rate")
    split_by: SplitBy = Field("prompt", description="validation has prompts of its own, or steps of the same ones")
    mask_loss: bool = Field(False, description="learn from masked positions alone")
    accept_threshold: float = Field(0.96, gt=0, lt=1, description="at which false positives and negatives are counted")
    chat: bool = Field(True, description="put the prompts into the chat template")
    batch_size: Batch = Field(32, description="prompts decoded at a time")
    seed: Seed = Field(0, description="of the order, the split and the first weights")

    @model_validator(mode="after")
    def _whole_blocks(self) -> Learn2PDTraining:
        if self.gen_length % self.block_length:
            raise InputError(
                f"gen_length={self.gen_length} is not a multiple of block_length={self.block_length}; change one of "
                "them"
            )
        return self

    def read(self, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """The shuffled prompts in a file, a JSON object with "prompt" a line."""
        remedy = 'write lines like {"prompt": "..."}'

        def check(row: dict[str, Any], where: str) -> str:
            if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
                raise InputError(f"{where} has no prompt; {remedy}")
            return row["prompt"]

        prompts = read_records(path, "prompts", remedy, check)
        random.Random(self.seed).shuffle(prompts)
        return prompts

    def traces(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]
    ) -> TraceDataset:
        """What the oracle did at these prompts."""
        # Decoding is the other stage's; its method is found by name.
        options = self.model_dump(include={"gen_length", "block_length", "chat", "batch_size"})
        return catalog.get(self.slug, "decode").load().traces(model, tokenizer, prompts, **options)

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        output_dir: str | Path,
        progress: Callable[..., None] | None = None,
    ) -> FilterTrainer:
        """A trainer for the prompts, whose traces are collected now. It writes nothing into `output_dir`."""
        collect = cache(partial(self.traces, model, tokenizer))
        names = {"epochs", "lr", "split_by", "mask_loss", "hidden", "accept_threshold", "seed"}
        options = {"progress": progress, "collect": collect, **self.model_dump(include=names)}
        trainer = FilterTrainer(collect(tuple(listed(prompts, "prompt"))), **options)
        trainer.filter.bind(model)
        return trainer

    def score(self, trainer: FilterTrainer, prompts: Sequence[str]) -> dict[str, float]:
        """See `filter_report`."""
        traces = trainer.collect(tuple(listed(prompts, "prompt")))
        return filter_report(trainer.filter, traces, self.accept_threshold, self.mask_loss)

    def save(self, trainer: FilterTrainer, folder: Path) -> None:
        trainer.filter.save(folder)
