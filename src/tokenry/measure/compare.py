"""compare(): run the arms of an experiment interleaved, sample by sample, and say what differs.

Interleaving means that all arms see the same machine at the same time. Differences are paired: by sample, after
averaging over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.progress import Progress
from ..models.anatomy import fingerprint
from ..models.prompts import tokenizer_hash
from .claims import Check, Contrast, above, all_of
from .experiment import Experiment
from .frontier import cost_ratio
from .statistics import Interval, bootstrap_statistic, paired_bootstrap
from .store import RunStore
from .task import COSTS, Metric, Outcome, Sample, Statistic

__all__ = ["Comparison", "Interrupted", "Part", "Runner", "beats", "compare", "identity", "made_of", "outcomes_of"]


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a comparison; what was measured is in the store."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"interrupted after {done} of {total} measurements")
        self.done, self.total = done, total


@dataclass
class Comparison:
    """All outcomes of an experiment, {(arm, sample, seed): outcome}, and what identifies the run."""

    experiment: Experiment
    samples: Sequence[Sample]
    outcomes: dict[tuple[str, str, int], Outcome]
    identity: dict[str, Any] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        """Their names."""
        return [arm.name for arm in self.experiment.arms]

    def sweep(self, name: str) -> dict[Any, str]:
        """The arms of a sweep: {value: name}."""
        return {arm.value: arm.name for arm in self.experiment.arms if arm.sweep == name}

    def quality(self, name: str) -> Metric | Statistic:
        """The metric or statistic of this name."""
        return next(q for q in self.experiment.qualities if q.name == name)

    def values(self, arm: str, name: str) -> np.ndarray:
        """A metric or cost of an arm, one number per sample (mean over seeds, NaN where not measured)."""
        rows = []
        for sample in self.samples:
            found = [self.outcomes.get((arm, sample.id, seed)) for seed in self.experiment.seeds]
            numbers = [(o.cost if name in COSTS else o.metrics).get(name, np.nan) for o in found if o is not None]
            numbers = [n for n in numbers if not np.isnan(n)]
            rows.append(np.mean(numbers) if numbers else np.nan)
        return np.array(rows, float)

    def table(self, arm: str) -> dict[str, np.ndarray]:
        """Every metric and cost of an arm: {name: (samples, seeds), NaN where not measured}."""
        names = [*(m.name for m in self.experiment.task.metrics), *COSTS]
        shape = (len(self.samples), len(self.experiment.seeds))
        found = {name: np.full(shape, np.nan) for name in names}
        for i, sample in enumerate(self.samples):
            for j, seed in enumerate(self.experiment.seeds):
                outcome = self.outcomes.get((arm, sample.id, seed))
                for name, value in {**outcome.metrics, **outcome.cost}.items() if outcome else ():
                    found[name][i, j] = value
        return found

    def mean(self, arm: str, name: str) -> float:
        """Mean over samples of a metric or cost, or the value of a statistic; NaN if nothing was measured."""
        statistic = self._statistic(name)
        if statistic:
            return statistic.compute({n: v.ravel() for n, v in self.table(arm).items()})
        values = self.values(arm, name)
        return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")

    def interval(self, arm: str, name: str) -> Interval:
        """A mean or statistic with its 95 % interval over samples."""
        statistic = self._statistic(name)
        if statistic is None:
            values = self.values(arm, name)
            return paired_bootstrap(values, np.zeros_like(values))
        table = self.table(arm)
        found = bootstrap_statistic(lambda pick: _compute(statistic, table, pick), len(self.samples))
        return found._replace(n=self._units(table))

    def difference(self, first: str, second: str, name: str) -> Interval:
        """Paired difference first - second of a mean or statistic, with its 95 % interval over samples."""
        statistic = self._statistic(name)
        if statistic is None:
            return paired_bootstrap(self.values(first, name), self.values(second, name))
        a, b = self.table(first), self.table(second)
        found = bootstrap_statistic(
            lambda pick: _compute(statistic, a, pick) - _compute(statistic, b, pick), len(self.samples)
        )
        return found._replace(n=min(self._units(a), self._units(b)))

    def _units(self, table: Mapping[str, np.ndarray]) -> int:
        """Samples for which a metric was measured: others of the task are there for something else."""
        measured = [~np.isnan(table[metric.name]).all(1) for metric in self.experiment.task.metrics]
        return int(np.any(measured, axis=0).sum())

    # Contrasts: what checks are made from, see `claims`.

    def value(self, name: str, arm: str, form: str = ".3f") -> Contrast:
        """A metric, cost or statistic of an arm."""
        return Contrast(self.interval(arm, name), f"{_words(name)}, {arm}", form)

    def gap(self, name: str, first: str, second: str, form: str = "+.3f") -> Contrast:
        """How much higher a metric, cost or statistic of one arm is than that of another."""
        return Contrast(self.difference(first, second, name), f"{_words(name)}, {first} - {second}", form)

    def ratio(self, name: str, first: str, second: str, form: str = ".2f") -> Contrast:
        """How many times as much of a cost or metric one arm has as another, in sum over all samples."""
        sums = self._sums(name, first, second)
        return Contrast(_over(sums, lambda a, b: a / b), f"{_words(name)}, {first} / {second}", form)

    def saved(self, name: str, arm: str, than: str, form: str = ".1%") -> Contrast:
        """The share of a cost or metric of `than`, in sum over all samples, that an arm does not have."""
        sums = self._sums(name, arm, than)
        return Contrast(_over(sums, lambda a, b: 1 - a / b), f"{_words(name)} saved, {arm} of {than}", form)

    def frontier(self, cost: str, first: str, second: str, at: str, keeps: tuple[str, float] | None = None) -> Contrast:
        """How many times the cost of a sweep another one has at equal quality `at`.

        Args:
            keeps: an arm and a margin: only qualities count that are not further below this arm's.
        """
        one, other = ([self.table(name) for name in self.sweep(sweep).values()] for sweep in (first, second))
        least, what = None, f"{_words(cost)} at equal {_words(at)}, {first} / {second}"
        if keeps:
            best, margin = self.table(keeps[0])[at], keeps[1]
            least, what = (
                lambda pick: float(np.nanmean(best[pick])) - margin,
                f"{what}, where at most {margin:g} is lost",
            )
        return Contrast(cost_ratio(one, other, cost, at, len(self.samples), least), what)

    def _sums(self, name: str, first: str, second: str) -> tuple[np.ndarray, np.ndarray]:
        """What both arms have, of the samples for which both were measured."""
        a, b = self.values(first, name), self.values(second, name)
        measured = ~np.isnan(a + b)
        return a[measured], b[measured]

    def _statistic(self, name: str) -> Statistic | None:
        return next((s for s in self.experiment.statistics if s.name == name), None)

    def details(self, arm: str) -> list[dict[str, Any]]:
        """What the report shows, of every sample and seed."""
        keys = [(arm, sample.id, seed) for seed in self.experiment.seeds for sample in self.samples]
        return [self.outcomes[key].detail for key in keys if key in self.outcomes]

    @property
    def side_by_side(self) -> bool:
        """Whether batches ran beside others, so that seconds and peak memory were left out."""
        return any(np.isnan(o.cost.get("seconds", 0.0)) for o in self.outcomes.values())

    def costs(self) -> list[str]:
        """The costs that were measured for at least one arm."""
        return [name for name in COSTS if any(not np.isnan(self.mean(s, name)) for s in self.arms)]

    def to_dict(self) -> dict[str, Any]:
        """Means, and paired differences of the metrics from the baseline, as JSON values."""
        metrics = [m.name for m in self.experiment.qualities]
        base = self.experiment.baseline
        return {
            "subjects": {s: {n: _number(self.mean(s, n)) for n in metrics + self.costs()} for s in self.arms},
            "differences": {
                s: {n: [_number(v) for v in self.difference(s, base, n)[:3]] for n in metrics}
                for s in self.arms
                if s != base
            },
            "samples": len(self.samples),
            "seeds": list(self.experiment.seeds),
        }


def made_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What identifies a model whatever it is called: its weights and its tokenizer."""
    return {"weights": fingerprint(model), "tokenizer": tokenizer_hash(tokenizer)}


def identity(experiment: Experiment, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that would change the numbers of a run, but for its samples and seeds, which are stored one by one."""
    return {
        "experiment": experiment.slug,
        "revision": experiment.revision,
        "tokenry": version("tokenry"),
        "task": {"name": experiment.task.slug, **getattr(experiment.task, "setting", {})},
        "subjects": {s.name: s.setting for s in experiment.arms},
        "models": {name: fingerprint(model) for name, model in experiment.models.items()},
        **(about or {}),
    }


@dataclass(frozen=True)
class Part:
    """One arm on one batch of samples, from the sample numbered `start` on, with one seed."""

    arm: str
    start: int
    seed: int


class Runner(Protocol):
    """Measures parts, and gives each with its outcomes, in any order."""

    def __call__(self, experiment: Experiment, parts: Iterable[Part]) -> Iterator[tuple[Part, list[Outcome]]]: ...

    def check(self, known: dict[str, Any]) -> None:
        """Refuse, before anything is measured, what would not measure the comparison with this `identity`."""


class InTurn:
    """The runner of this process: one part after the other."""

    def __call__(self, experiment: Experiment, parts: Iterable[Part]) -> Iterator[tuple[Part, list[Outcome]]]:
        samples = list(experiment.task.samples())
        for part in parts:
            yield part, outcomes_of(experiment, samples, part)

    def check(self, known: dict[str, Any]) -> None:
        pass


def outcomes_of(experiment: Experiment, samples: Sequence[Sample], part: Part) -> list[Outcome]:
    """What is measured of one part."""
    arm = next(arm for arm in experiment.arms if arm.name == part.arm)
    return experiment.task.run(arm, samples[part.start : part.start + experiment.batch], part.seed)


def compare(
    experiment: Experiment,
    store: RunStore | None = None,
    *,
    about: dict[str, Any] | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    runner: Runner | None = None,
) -> Comparison:
    """Run an experiment. With a store every outcome is kept at once, and `resume` skips what is there: a run can be
    finished, or extended by more samples or seeds.

    Args:
        about: what identifies the run beside the experiment itself: the model, its `made_of`, options.
        progress: called with (done, total, what is running).
        runner: measures instead of this process.

    Raises:
        Interrupted: on Ctrl-C, after the current state has been stored.
    """
    runner = runner or InTurn()
    samples = list(experiment.task.samples())
    known = identity(experiment, about)
    runner.check(known)
    run = store.begin(known, resume) if store else 0
    wanted = {
        (s.name, x.key, seed): (s.name, x.id, seed)
        for s in experiment.arms
        for x in samples
        for seed in experiment.seeds
    }
    outcomes = {wanted[key]: o for key, o in store.outcomes(run).items() if key in wanted} if store else {}
    total = len(wanted)

    def todo() -> Iterator[Part]:
        for part, batch in _parts(experiment, samples):
            if progress:
                progress(len(outcomes), total, part.arm)
            if any((part.arm, s.id, part.seed) not in outcomes for s in batch):
                yield part

    try:
        for part, measured in runner(experiment, todo()):
            batch = samples[part.start : part.start + experiment.batch]
            rows = list(zip(batch, measured, strict=True))
            if store:
                store.add(run, [(part.arm, s.key, part.seed, o) for s, o in rows])
            outcomes.update({(part.arm, s.id, part.seed): o for s, o in rows})
    except KeyboardInterrupt:
        raise Interrupted(len(outcomes), total) from None
    if progress:
        progress(total, total, "done")
    return Comparison(experiment, samples, outcomes, known)


def _parts(experiment: Experiment, samples: Sequence[Sample]) -> Iterator[tuple[Part, Sequence[Sample]]]:
    """All parts with their samples; the arms take turns, batch by batch."""
    for seed in experiment.seeds:
        for start in range(0, len(samples), experiment.batch):
            for arm in _rotated(experiment.arms, start // experiment.batch):
                yield Part(arm.name, start, seed), samples[start : start + experiment.batch]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _over(sums: tuple[np.ndarray, np.ndarray], compute: Callable[[Any, Any], float]) -> Interval:
    """A number from the sums of two arms, with its interval over samples; NaN where the second has none."""
    a, b = sums
    if not len(a):
        return Interval(float("nan"), float("nan"), float("nan"), 0)

    def over(pick: np.ndarray) -> float:
        whole = b[pick].sum()
        return float(compute(a[pick].sum(), whole)) if whole else float("nan")

    return bootstrap_statistic(over, len(a))


def _compute(statistic: Statistic, table: dict[str, np.ndarray], pick: np.ndarray) -> float:
    return statistic.compute({name: values[pick].ravel() for name, values in table.items()})


def _rotated(arms: Sequence, by: int) -> list:
    """Another arm goes first in every batch, so that none always meets a cold or a warm machine."""
    by %= len(arms)
    return [*arms[by:], *arms[:by]]


def _number(value: float) -> float | None:
    return None if np.isnan(value) or np.isinf(value) else round(float(value), 6)


def beats(c: Comparison, metric: str, arm: str, controls: Sequence[str], form: str = "+.3f") -> Check:
    """Whether an arm is better than each of the controls; shown is the one that it is least ahead of."""
    lower = c.quality(metric).better == "lower"
    gaps = [c.gap(metric, *((name, arm) if lower else (arm, name)), form) for name in controls]
    checks = [above(gap, 0) for gap in gaps]
    worst = min(checks, key=lambda check: (check.number.interval.low, check.number.interval.mean))
    outcome, others = all_of(*checks).outcome, len(checks) - 1
    more = "; ".join(check.number.shown for check in checks if check is not worst)
    asked = f"above 0 against each of {others + 1}: {outcome}" if others else f"above 0: {outcome}"
    return Check(outcome, f"{worst.number} ({asked})" + (f"; others {more}" if others else ""), worst.number)
