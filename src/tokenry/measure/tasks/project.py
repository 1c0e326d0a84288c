"""The task `project`: how well a model tuned to one software project foretells files of it, and of another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...models.anatomy import vocabulary_size
from ...train.projects.evaluation import foretell, line_ends
from ...train.projects.files import SourceFile
from ..task import Arm, Metric, Outcome, Sample

__all__ = ["CONTROL", "PROJECT", "ProjectTask", "Tuned"]

PROJECT, CONTROL = "project", "control"
BATCH = 4


class Tuned(NamedTuple):
    """A model with what its tuning took: seconds of the processor, operations, and bytes to keep for the project."""

    model: PreTrainedModel
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0


class ProjectTask:
    """A sample is a stretch of a file that was held out, of the project or of the control.

    An arm's `apply` gives the tuned model of a seed. It is called for every batch, so a batch should hold all samples.
    """

    slug: ClassVar[str] = "project"
    stage: ClassVar[str] = "train"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("loss", "lower", "nats per token, files of the project"),
        Metric("exact_match", "higher", "share of lines completed exactly, files of the project"),
        Metric("control_loss", "lower", "nats per token, files of the control"),
        Metric("control_exact_match", "higher", "share of lines completed exactly, files of the control"),
        Metric("training_seconds", None, "seconds of the training, on the processor"),
        Metric("flops", None, "operations of the training"),
        Metric("bytes", None, "bytes to keep for the project"),
    )

    def __init__(self, tokenizer: PreTrainedTokenizerBase, held: Mapping[str, Sequence[SourceFile]]) -> None:
        self.tokenizer = tokenizer
        self._samples = [
            Sample(f"{side}/{file.name}", str(tokenizer.decode(file.ids)), {"side": side, "ids": file.ids})
            for side, files in held.items()
            for file in files
        ]

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        of_seed: Callable[[int], Tuned] = arm.apply
        model, seconds, flops, size = of_seed(seed)
        ends = line_ends(self.tokenizer, vocabulary_size(model))
        outcomes = []
        for sample, found in zip(samples, foretell(model, [s.data["ids"] for s in samples], ends, BATCH)):
            prefix = "control_" if sample.data["side"] == CONTROL else ""
            metrics = {f"{prefix}loss": found.nats / found.tokens}
            if found.lines:
                metrics[f"{prefix}exact_match"] = found.exact / found.lines
            cost = {"training_seconds": seconds, "flops": flops, "bytes": size}
            outcomes.append(Outcome({**metrics, **cost}, detail={"note": f"{found.exact} of {found.lines} lines"}))
        return outcomes
