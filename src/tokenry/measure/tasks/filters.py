"""Filters that are trained for a comparison, what they are trained on, and what they are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.tensors import read_tensors
from ...data.problems import draw_problems
from ...data.puzzles import PUZZLES
from ...decode.denoising.loop import MaskedDiffusionModel, diffusion_generate
from ...decode.denoising.oracle import OraclePolicy, collect_egp_traces
from ...decode.denoising.state import DiffusionState, Prediction
from ...decode.denoising.unmask import UnmaskPolicy, best_first
from ...learned.confidence_filter import ConfidenceFilter, TraceDataset
from ...train.filters.loss import filter_report
from ...train.filters.trainer import FilterTrainer
from ..build_cache import built_once, digest

__all__ = [
    "AtRandom",
    "OwnConfidence",
    "OwnTrainer",
    "PlainOracle",
    "report_of",
    "shuffled",
    "threshold_of_equal_error",
    "trained_filter",
    "training_traces",
]


class OwnConfidence(ConfidenceFilter):
    """A logistic regression for each position, of its own confidence and its log-odds: no context."""

    def __init__(self, block_length: int, hidden: int | None = None) -> None:
        super().__init__(block_length, hidden)
        del self.layers
        self.weight, self.bias = nn.Parameter(torch.zeros(2, block_length)), nn.Parameter(torch.zeros(block_length))

    def forward(self, conf: Tensor) -> Tensor:
        odds = conf.clamp(1e-6, 1 - 1e-6).logit() / 10  # of the order of confidences
        return self.weight[0] * conf + self.weight[1] * odds + self.bias


class OwnTrainer(FilterTrainer):
    """Trains an `OwnConfidence`."""

    untrained = OwnConfidence


class AtRandom(UnmaskPolicy):
    """This share of the candidates, drawn, and the most confident one."""

    def __init__(self, share: float) -> None:
        self.share = share

    def select(self, prediction: Prediction, state: DiffusionState) -> Tensor:
        candidates = state.candidates
        return candidates & ((state.uniform() < self.share) | (best_first(prediction.confidence, candidates) == 0))


class PlainOracle(OraclePolicy):
    """Finds the plain decoder's answers itself, in forwards that are not counted."""

    def __init__(self, model: MaskedDiffusionModel) -> None:
        self.model = model

    def reset(self, state: DiffusionState) -> None:
        prompts, present = state.x[:, : state.start], state.present[:, : state.start]
        width = int(state.gen_length.max())
        plain = diffusion_generate(self.model, prompts, present, gen_length=width, block_length=state.block_length)
        self.reference = torch.tensor(plain.windows)
        super().reset(state)


def training_traces(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    count: int,
    gen_length: int,
    block_length: int,
) -> TraceDataset:
    """Traces of `count` training problems; collected where they are not kept yet."""

    def collect() -> TraceDataset:
        drawn = [draw_problems(task, count // len(PUZZLES), 0, "train") for task in PUZZLES]
        prompts = [problem.question for problems in drawn for problem in problems]
        return collect_egp_traces(
            model, tokenizer, prompts, batch_size=60, gen_length=gen_length, block_length=block_length
        )

    return built_once(
        folder / f"traces-{digest([count, gen_length, block_length])}.safetensors",
        collect,
        lambda found, part: save_file({name: values.contiguous() for name, values in found._asdict().items()}, part),
        lambda kept: TraceDataset(**read_tensors(kept)[0]),
    )


def trained_filter(
    trainer: type[FilterTrainer], traces: TraceDataset, folder: Path, name: str, key: Any, seed: int, **options: Any
) -> ConfidenceFilter:
    """A filter of these traces; trained where it is not kept yet.

    Args:
        name, key: what it is called, and what decides its traces.
        seed: of its first weights, and of what is held out.
    """
    made = trainer(traces, seed=seed, **options)

    def trained() -> dict[str, Tensor]:
        made.train()
        return made.filter.state_dict()

    path = folder / f"{name.replace(' ', '-')}-{seed}-{digest([key, options])}.safetensors"
    made.filter.load_state_dict(built_once(path, trained, save_file, lambda kept: read_tensors(kept)[0]))
    return made.filter.eval()


def shuffled(traces: TraceDataset, seed: int) -> TraceDataset:
    """The same with labels of other positions and steps."""
    order = torch.randperm(traces.label.numel(), generator=torch.Generator().manual_seed(seed))
    return traces._replace(label=traces.label.flatten()[order].reshape(traces.label.shape))


def report_of(made: ConfidenceFilter, traces: TraceDataset, seed: int, accept: float) -> dict[str, float]:
    """What a filter is worth on traces that it has not been trained on."""
    return filter_report(made, FilterTrainer(traces, seed=seed).test, accept)


def threshold_of_equal_error(traces: TraceDataset, wrong: float) -> float:
    """The lowest threshold of which at most this share of the accepted predictions is not final."""
    conf, order = traces.conf[traces.mask].sort(descending=True)
    final = traces.label[traces.mask][order]
    share = (~final).cumsum(0) / torch.arange(1, len(final) + 1)
    fits = (share <= wrong).nonzero()
    return float(conf[int(fits[-1])]) if len(fits) else 1.0
