"""What is measured: a task's samples, how an arm runs on them, and metrics with their better direction."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from ..core.method import Method

__all__ = ["COSTS", "OF_METHOD", "Arm", "Metric", "Outcome", "Role", "Sample", "Statistic", "Task"]

Role = Literal["plain", "control", "method"]
OF_METHOD: Any = None  # a setting that is still to be taken from the method

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

    `compute` takes the arm's metrics and costs, {name: (samples * seeds,) array, NaN where not measured}.
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
class Arm:
    """What is compared: the plain model, a control that could fool the claim, or a method.

    Attributes:
        method: the settings of a method, if it is one.
        setting: what identifies it in the run store (JSON values); default: those of the method.
        apply: what the task needs to run it, beside or instead of the method.
        sweep: the sweep that it belongs to, and `value` its place there; see `experiment.sweep`.
    """

    name: str
    method: Method | None = None
    role: Role = "method"
    setting: dict[str, Any] = OF_METHOD
    apply: Any = None
    sweep: str = ""
    value: Any = None

    def __post_init__(self) -> None:
        if self.setting is OF_METHOD:
            object.__setattr__(self, "setting", self.method.model_dump(mode="json") if self.method else {})

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for `tokenry.generate`: the method, and what `apply` has."""
        return {**({"methods": [self.method]} if self.method else {}), **(self.apply or {})}


@dataclass
class Outcome:
    """Result of one arm on one sample: metrics, costs (keys of COSTS) and what the report shows."""

    metrics: dict[str, float]
    cost: dict[str, float] = field(default_factory=dict)
    detail: dict[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Samples and how to run and score an arm on them.

    What would change the numbers and is in no sample (a width, a number of draws) is in the task's `setting`, a dict of
    JSON values as that of an `Arm`; a task whose samples say everything needs none.
    """

    slug: ClassVar[str]
    stage: ClassVar[str]
    metrics: ClassVar[Sequence[Metric]]

    def samples(self) -> Sequence[Sample]:
        """All samples, in a fixed order."""
        ...

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        """Run `arm` on a batch of samples; one outcome each."""
        ...
