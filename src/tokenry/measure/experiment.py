"""An experiment: what it declares, what it builds on a model, and what `compare` then runs.

@experiment("creditdecoding", CreditDecoding, model="zoo/denoiser", samples=240, seeds=(0, 1, 2), quick=4)
def build(run: Run[CreditDecoding]) -> Design: ...

@build.findings
def findings(c: Comparison) -> list[Finding]: ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.method import Method
from .build_cache import kept_folder
from .claims import Finding
from .task import Arm, Metric, Statistic, Task

__all__ = ["Declaration", "Design", "Experiment", "Run", "experiment", "sweep"]

M = TypeVar("M", bound=Method)
N = TypeVar("N", bound=Method)


@dataclass(frozen=True)
class Run(Generic[M]):
    """What an experiment is built for.

    Attributes:
        samples: how many; None where all there are is the default.
        method: settings from outside that replace the experiment's own, or None.
        quick: whether the smallest size is wanted of what is built beforehand, too.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    samples: int | None
    seeds: tuple[int, ...]
    method: M | None = None
    quick: bool = False

    @property
    def count(self) -> int:
        """How many samples, where the experiment has a number of its own: never None."""
        if self.samples is None:
            raise TypeError("the experiment declares no number of samples; give `samples` to its decorator")
        return self.samples

    @property
    def given(self) -> dict[str, Any]:
        """What the method from outside sets."""
        return {name: getattr(self.method, name) for name in self.method.model_fields_set} if self.method else {}

    def settings(self, method: type[N], **default: Any) -> N:
        """The method with the experiment's defaults, but for what is given."""
        return method(**{**default, **self.given})

    def folder(self, slug: str) -> Path:
        """Where what is built for this model is kept."""
        return kept_folder(slug, self.model, self.tokenizer)

    def size(self, full: int, quick: int) -> int:
        """How much to build beforehand."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Design:
    """What is compared, and on what.

    Attributes:
        baseline: the arm that tables show differences from.
        on: what the main number is of, where that is not the model: one that is trained here, tokenizers, a simulation.
        tried: what was tried before the settings were these, and on which problems.
        batch, seeds: instead of those of the run.
        statistics: numbers over all samples that are no means.
        models: those that the numbers depend on beside the measured one (a drafter, a twin).
        facts: what was measured while building; arguments of the findings.
    """

    task: Task
    arms: Sequence[Arm]
    baseline: str
    on: str = ""
    notes: str = ""
    tried: str = ""
    batch: int | None = None
    seeds: tuple[int, ...] | None = None
    statistics: Sequence[Statistic] = ()
    models: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A design with its claim, ready to run; `findings` turns the finished `Comparison` into findings.

    `on`, `limit` and `tried` are for the record, see `Declaration` and `Design`. `revision` goes up with a change of
    the experiment that changes numbers and is in no setting: a run is resumed by the same revision alone.
    """

    slug: str
    claim: str
    task: Task
    arms: Sequence[Arm]
    baseline: str
    findings: Callable[[Any], list[Finding]]
    seeds: Sequence[int] = (0,)
    batch: int = 1
    on: str = ""
    notes: str = ""
    tried: str = ""
    limit: int | None = None
    statistics: Sequence[Statistic] = ()
    models: Mapping[str, Any] = field(default_factory=dict)
    revision: int = 1

    @property
    def qualities(self) -> list[Metric | Statistic]:
        """What a comparison shows of quality: the statistics, then the task's metrics."""
        return [*self.statistics, *self.task.metrics]


@dataclass
class Declaration:
    """An experiment as its module declares it; called with a model it gives the `Experiment`.

    Attributes:
        model: the one it is made for, which `tokenry compare` takes by default.
        quick: samples of the smallest run that makes sense, with one seed.
        limit: samples up to which a run that is undecided may be extended, fixed before it is.
        claim: what is tested, where that is not what the method's paper says.
    """

    build: Callable[[Run[Any]], Design]
    slug: str
    method: type[Method]
    model: str
    samples: int | None
    seeds: tuple[int, ...]
    batch: int
    quick: int
    claim: str
    revision: int
    limit: int | None
    judge: Callable[..., Iterable[Finding]] | None = None

    def findings(self, judge: Callable[..., Iterable[Finding]]) -> Callable[..., Iterable[Finding]]:
        """Decorator of the function that makes the findings of a comparison."""
        self.judge = judge
        return judge

    def __call__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        samples: int | None = None,
        seeds: Sequence[int] | None = None,
        method: Any = None,
        quick: bool = False,
    ) -> Experiment:
        """Build it. With `quick`, samples and seeds that are not given are the fewest that make sense."""
        count = samples or (self.quick if quick else self.samples)
        chosen = tuple(seeds or (self.seeds[:1] if quick else self.seeds))
        design = self.build(Run(model, tokenizer, count, chosen, method, quick))
        return Experiment(
            slug=self.slug,
            claim=self.claim,
            task=design.task,
            arms=list(design.arms),
            baseline=design.baseline,
            findings=partial(_listed, self.judge, design.facts),
            seeds=design.seeds or chosen,
            batch=design.batch or self.batch,
            on=design.on,
            notes=design.notes,
            tried=design.tried,
            limit=self.limit,
            statistics=design.statistics,
            models=design.models,
            revision=self.revision,
        )


def _listed(judge: Callable[..., Iterable[Finding]] | None, facts: Mapping[str, Any], comparison: Any) -> list[Finding]:
    if judge is None:
        raise TypeError("the experiment has no findings; decorate the function that makes them with `build.findings`")
    return list(judge(comparison, **facts))


def experiment(
    slug: str,
    method: type[M],
    *,
    quick: int,
    model: str = "smollm2",
    samples: int | None = None,
    seeds: Sequence[int] = (0,),
    batch: int = 1,
    claim: str = "",
    revision: int = 1,
    limit: int | None = None,
) -> Callable[[Callable[[Run[M]], Design]], Declaration]:
    """Decorator that declares an experiment; the function builds its `Design`. See `Declaration`."""

    def declare(build: Callable[[Run[M]], Design]) -> Declaration:
        said = claim or method.claim
        return Declaration(build, slug, method, model, samples, tuple(seeds), batch, quick, said, revision, limit)

    return declare


def sweep(name: str, method: Method, role: Literal["control", "method"] = "method", **settings: Any) -> list[Arm]:
    """An arm for each value of the one setting that is a tuple; the others are fixed. They are called `name value`."""
    ((varied, values),) = ((key, value) for key, value in settings.items() if isinstance(value, tuple))
    changes = [{**settings, varied: value} for value in values]
    arms = [method.model_copy(update=change) for change in changes]
    return [Arm(f"{name} {value}", arm, role, sweep=name, value=value) for value, arm in zip(values, arms, strict=True)]
