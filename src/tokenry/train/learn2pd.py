"""Training the filter of Learn2PD: which predictions of a masked-diffusion model are final, learned from traces.

Paper: Learning to Parallel: Accelerating Diffusion Large Language Models via Adaptive Parallel Decoding, arXiv
2509.25188. A trace is decoded with an oracle that commits exactly what agrees with the plain decoder's answer; each of
its steps shows the confidences of a block and which of the predictions were final. `tokenry decode --method learn2pd
--save-traces` writes them; prompts are all it takes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.fields import Count, Rate, Seed, Width
from ..core.progress import Progress
from ..learned.confidence_filter import TraceDataset
from ..learned.filter_traces import TraceHeader, read_traces
from ..models.anatomy import fingerprint
from .contract import TrainMethod
from .filters.loss import filter_report
from .filters.trainer import FilterTrainer, SplitBy

__all__ = ["Learn2PDTraining", "PromptTraces"]


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
    data: ClassVar[str] = "what `tokenry decode --method learn2pd --save-traces FILE` writes"
    measures: ClassVar[dict[str, str]] = {
        "loss": "binary cross-entropy",
        "false_positives": "share of accepted predictions that are not final",
        "false_negatives": "share of final predictions not accepted",
        "calibration": "calibration error",
        "accepted": "share of predictions that are accepted",
    }
    next_step: ClassVar[str] = "tokenry decode --method learn2pd -o filter={output} --model {model} --greedy PROMPT"

    hidden: Width | None = Field(default=None, description="width of the filter's hidden layer; default: as the block")
    epochs: Count = Field(default=2000, description="most passes over the traces; it stops when validation does")
    lr: Rate = Field(default=3e-3, description="learning rate")
    split_by: SplitBy = Field(
        default="prompt", description="validation has prompts of its own, or steps of the same ones"
    )
    mask_loss: bool = Field(default=False, description="learn from masked positions alone")
    accept_threshold: float = Field(
        default=0.96, gt=0, lt=1, description="at which false positives and negatives are counted"
    )
    seed: Seed = Field(default=0, description="of the order, the split and the first weights")

    def read(self, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[PromptTraces]:
        """The shuffled prompts in a file of traces, see `tokenry.learned.read_traces`."""
        traces, made_with = read_traces(path)
        order = traces.prompt_id.argsort(stable=True)
        lengths = traces.prompt_id.unique(return_counts=True)[1].tolist()
        parts = zip(*(values.split(lengths) for values in traces.take(order)))
        prompts = [PromptTraces(TraceDataset(*part), made_with) for part in parts]
        random.Random(self.seed).shuffle(prompts)
        return prompts

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[PromptTraces],
        output_dir: str | Path,
        progress: Progress | None = None,
    ) -> FilterTrainer:
        """A trainer for the traces of prompts. It writes nothing into `output_dir`.

        Raises:
            InputError: no prompts, or traces of another model.
        """
        if not prompts:
            raise InputError("there are no prompts to train on; trace more, or hold fewer out")
        found, made_with = fingerprint(model), prompts[0].made_with
        if found != made_with.fingerprint:
            raise InputError(
                f"the traces are those of {made_with.model!r} (weights {made_with.fingerprint}), not of the weights "
                f"{found}; trace this model with `tokenry decode --save-traces`"
            )
        trainer = FilterTrainer(_joined(prompts), progress=progress, **self.model_dump())
        trainer.filter.bind(model)
        return trainer

    def score(self, trainer: FilterTrainer, prompts: Sequence[PromptTraces]) -> dict[str, float]:
        """See `filter_report`."""
        return filter_report(trainer.filter, _joined(prompts), self.accept_threshold, self.mask_loss)

    def save(self, trainer: FilterTrainer, folder: Path) -> None:
        trainer.filter.save(folder)


class PromptTraces(NamedTuple):
    """The traces of one prompt, and of which model."""

    traces: TraceDataset
    made_with: TraceHeader


def _joined(prompts: Sequence[PromptTraces]) -> TraceDataset:
    """The traces of all prompts, numbered in this order, which is a drawn one."""
    numbered = enumerate(prompt.traces for prompt in prompts)
    return TraceDataset.join([one._replace(prompt_id=torch.full_like(one.prompt_id, n)) for n, one in numbered])
