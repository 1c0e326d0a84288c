"""What is measured: a task's samples, how a subject runs on them, and metrics with their better direction."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

__all__ = ["COSTS", "Experiment", "Finding", "Metric", "Outcome", "Sample", "Statistic", "Subject", "Task"]

COSTS = {
    "seconds": "wall-clock seconds",
    "tokens": "tokens generated",
    "forward_passes": "forward passes",
    "tokens_processed": "tokens fed to the model",
    "peak_bytes": "peak memory above the start, in bytes",
    "cache_bytes": "key-value cache at the end, in bytes",
}


@dataclass(frozen=True)
class Metric:
    """A quality number per sample. `better` is None for numbers that only describe."""

    name: str
    better: Literal["higher", "lower"] | None
    description: str


@dataclass(frozen=True)
class Statistic:
    """A quality number over all samples that is no mean, such as a rank correlation.

    `compute` takes the subject's metrics and costs, {name: (samples * seeds,) array, NaN where not measured}.
    """

    name: str
    better: Literal["higher", "lower"] | None
    description: str
    compute: Callable[[Mapping[str, np.ndarray]], float]


@dataclass(frozen=True)
class Sample:
    """One input. `data` holds whatever else the task needs to run and score it."""

    id: str
    prompt: str
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Its name in the run store: the id, and a hash of what it holds, so that another sample is another one."""
        text = json.dumps([self.prompt, self.data], sort_keys=True, default=repr)
        return f"{self.id} {hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:12]}"


@dataclass(frozen=True)
class Subject:
    """What is compared: the plain model, a control that could fool the claim, or a method.

    `setting` is what identifies it in the run store (JSON values); `apply` is what the task needs to run it.
    """

    name: str
    role: Literal["plain", "control", "method"]
    setting: dict[str, Any] = field(default_factory=dict)
    apply: Any = None


@dataclass
class Outcome:
    """Result of one subject on one sample: metrics, costs (keys of COSTS) and what the report shows."""

    metrics: dict[str, float]
    cost: dict[str, float] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Samples and how to run and score a subject on them.

    What would change the numbers and is in no sample (a width, a number of draws) is in the task's `setting`, a dict of
    JSON values as that of a `Subject`; a task whose samples say everything needs none.
    """

    slug: str
    stage: str
    metrics: Sequence[Metric]

    def samples(self) -> Sequence[Sample]:
        """All samples, in a fixed order."""

    def run(self, subject: Subject, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        """Run `subject` on a batch of samples; one outcome each."""


@dataclass(frozen=True)
class Finding:
    """One sentence of the claim, with the numbers that decide it."""

    statement: str
    holds: bool
    numbers: str


@dataclass(frozen=True)
class Experiment:
    """A claim and how to test it: a task, the subjects with their controls, and what decides.

    `judge` turns a finished `Comparison` into findings. The verdict is `reproduced` if all hold,
    `direction only` if the first one holds, else `not reproduced`.

    `models` are those that the numbers depend on beside the measured one (a drafter, a twin). `revision` goes up with a
    change of the experiment that changes numbers and is in no setting: a run is resumed by the same revision alone.
    """

    slug: str
    claim: str
    task: Task
    subjects: Sequence[Subject]
    baseline: str
    judge: Callable[[Any], list[Finding]]
    seeds: Sequence[int] = (0,)
    batch: int = 1
    notes: str = ""
    statistics: Sequence[Statistic] = ()
    models: Mapping[str, Any] = field(default_factory=dict)
    revision: int = 1

    @property
    def qualities(self) -> list[Metric | Statistic]:
        """What a comparison shows of quality: the statistics, then the task's metrics."""
        return [*self.statistics, *self.task.metrics]

    def verdict(self, findings: Sequence[Finding]) -> str:
        if all(f.holds for f in findings):
            return "reproduced"
        return "direction only" if findings and findings[0].holds else "not reproduced"
