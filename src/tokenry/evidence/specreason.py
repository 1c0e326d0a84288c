"""Does the base model write less than half, at equal accuracy, and is it its judgment that does it?

Judge and threshold are chosen on other problems. Against the method stand the base model alone, the small one alone, a
judge that draws its scores at random and keeps as many steps, and one that knows which steps are right.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import InputError
from ..data.problems import Arithmetic, Problem, draw_problems
from ..decode.reasoning.scores import StepScore, StepScorer
from ..decode.reasoning.speculative import ReasoningResult, SpeculativeReasoner, step_speedup
from ..decode.reasoning.step_prompts import PRESETS, Messages, prompts_for
from ..decode.specreason import SpecReason
from ..measure.compare import Comparison
from ..measure.statistics import Interval, bootstrap_statistic
from ..measure.task import Experiment, Finding, Subject
from ..measure.tasks.arithmetic import auroc
from ..measure.tasks.steps import StepsTask, outcome, right_step
from ..models.load import Loaded, load

__all__ = ["build"]

BASE, SMALL, RANDOM, ORACLE, METHOD = (
    "base alone",
    "small alone",
    "random judge, same share kept",
    "judge that knows",
    "specreason",
)
OTHERS = {"digits": "judge asked for a digit", "likelihood": "judge by likelihood"}
LEVELS = (3, 4, 5, 6)
BUDGET = 256
ALL, NONE = 0.0, 9.5  # thresholds at which every step is kept, and none
THRESHOLDS = {"digits": (ALL, 4.0, 5.0, 6.0, 7.0, 8.0), "likelihood": (1.0, 3.0, 5.0, 7.0)}
CHOSEN_ON, TIMED_ON = 96, 20  # problems of the dev split
TOLERANCE, HALF, FASTER, TELLS = 0.02, 0.5, 1.3, 0.8
LARGE, VERIFY = (32.0, 1.5), 2.0  # billions of weights; tokens of the base model that a judgment is taken to cost


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    method: SpecReason | None = None,
) -> Experiment:
    """Choose judge and threshold on the dev split, take times, then compare on the test split.

    Args:
        samples: test problems; default 320. At most twice as many serve to choose.
        method: its small model, prompts, judge and threshold replace those of this experiment where it sets them.
    """
    given = {name: getattr(method, name) for name in method.model_fields_set} if method else {}
    pair = Pair(Loaded(model, tokenizer), SpecReason(**given))
    count = samples or 320
    dev = draw_problems(Arithmetic(), min(CHOSEN_ON, max(2 * count, 8)), split="dev", levels=LEVELS)
    sweep = sweep_thresholds(pair, dev, given)
    ways = list(dict.fromkeys(way for way, _ in sweep if way))
    chosen, best = choose(sweep, ways), {way: choose(sweep, [way]) for way in ways}
    times = take_times(pair, chosen, dev[:TIMED_ON])
    problems = draw_problems(Arithmetic(), count, levels=LEVELS)
    return Experiment(
        slug=SpecReason.slug,
        claim=SpecReason.claim,
        task=StepsTask(problems),
        subjects=make_subjects(pair, chosen, best, sweep[chosen].acceptance),
        baseline=BASE,
        judge=partial(judge, times=times, way=chosen[0]),
        seeds=tuple(seeds or (0, 1)),
        batch=64,
        models={"small": pair.small.model},
        notes=f"Levels {LEVELS[0]} to {LEVELS[-1]}, at most {BUDGET} tokens, temperature 0.6, top-p 0.95. Judge and "
        f"threshold, {chosen[0]} {chosen[1]:g}, were chosen on {len(dev)} problems of the dev split: the fewest base "
        f"tokens at an accuracy no more than {TOLERANCE:.0%} below the base model alone. The paper asks the judge for "
        "a digit; likelihood is ours, the base model's own probability of the step. "
        + describe(sweep)
        + " The judge that knows is a ceiling and no method. Large models: seconds per token are taken to go with the "
        f"weights ({LARGE[0]:g} and {LARGE[1]:g} billion), a judgment to cost {VERIFY:g} tokens of the base model.",
    )


# --- running -------------------------------------------------------------------------------------------------------


Judged = tuple[str, float]  # a way to score, and a threshold; no way: the base model alone
PLAIN: Judged = ("", NONE)


class Pair:
    """The two models and the words they share."""

    def __init__(self, base: Loaded, method: SpecReason) -> None:
        self.base, self.small = base, method.small
        if isinstance(self.small, str):
            self.small = load(self.small, base.model.dtype, base.model.device)
        self.prompts = method.prompts or prompts_for(base.model)
        if self.prompts != PRESETS["lines"]:
            raise InputError("this comparison checks the lines of zoo/reasoner; use --model zoo/reasoner")

    def reasoner(self, scorer: StepScorer, **values: Any) -> SpeculativeReasoner:
        return SpeculativeReasoner(self.base, self.small, scorer, token_budget=BUDGET, prompts=self.prompts, **values)

    def alone(self) -> SpeculativeReasoner:
        """The base model alone, step by step."""
        return self.reasoner(RandomJudge(0.0, 0), first_n_base_steps=BUDGET)

    def judged(self, judged: Judged) -> SpeculativeReasoner:
        score_method, threshold = judged
        scorer = SpecReason(score_method=score_method).scorer(self.base, self.prompts)
        return self.reasoner(scorer, threshold=threshold)


class Tried(NamedTuple):
    """What a threshold gives on the problems it is chosen on."""

    accuracy: float
    base_tokens: float
    acceptance: float


def tried(reasoner: SpeculativeReasoner, problems: Sequence[Problem]) -> Tried:
    results = reasoner.generate_many([problem.question for problem in problems], seed=0)
    found = [outcome(problem, result).metrics for problem, result in zip(problems, results)]
    stats = [result.stats for result in results]
    judged = sum(one.judged for one in stats)
    return Tried(
        float(np.mean([one["accuracy"] for one in found])),
        float(np.mean([one["base_tokens"] for one in found])),
        sum(one.accepted for one in stats) / judged if judged else 0.0,
    )


def sweep_thresholds(pair: Pair, problems: Sequence[Problem], given: dict[str, Any]) -> dict[Judged, Tried]:
    """Every judge at every threshold. Above all scores it is the base model alone, which needs no judge."""
    ways = [given["score_method"]] if "score_method" in given else list(THRESHOLDS)
    grid = [
        (way, threshold)
        for way in ways
        for threshold in ([given["threshold"]] if "threshold" in given else THRESHOLDS.get(way, THRESHOLDS["digits"]))
    ]
    found = {PLAIN: tried(pair.alone(), problems)}
    return found | {judged: tried(pair.judged(judged), problems) for judged in tqdm(grid, desc="thresholds")}


def choose(sweep: dict[Judged, Tried], ways: Sequence[str]) -> Judged:
    """The fewest base tokens among the settings about as accurate as the base model alone, else the most accurate."""
    mine = {judged: one for judged, one in sweep.items() if judged[0] in ways}
    good = [judged for judged, one in mine.items() if one.accuracy >= sweep[PLAIN].accuracy - TOLERANCE]
    if not good:
        return max(mine, key=lambda judged: mine[judged].accuracy)
    return min(good, key=lambda judged: mine[judged].base_tokens)


def describe(sweep: dict[Judged, Tried]) -> str:
    rows = [
        f"{way or 'no step kept'} {threshold:g}: {one.accuracy:.1%}, {one.base_tokens:.1f}, {one.acceptance:.0%}"
        for (way, threshold), one in sweep.items()
    ]
    return f"Sweep on dev (threshold: accuracy, base tokens, steps kept): {'; '.join(rows)}."


class Times(NamedTuple):
    """On single problems, medians: seconds per token of each model and per judgment, tokens per step, and how many
    times faster the method is."""

    small: float
    base: float
    verify: float
    step_tokens: float
    faster: float


def take_times(pair: Pair, chosen: Judged, problems: Sequence[Problem]) -> Times:
    """One problem at a time, the base model alone and the method by turns; the first one warms up."""
    alone, both = pair.alone(), pair.judged(chosen)
    rows = []
    for seed, problem in enumerate([problems[0], *problems]):
        start = time.perf_counter()
        plain = alone.generate(problem.question, seed=seed)
        middle = time.perf_counter()
        stats = both.generate(problem.question, seed=seed).stats
        end = time.perf_counter()
        rows.append(
            Times(
                stats.small_seconds / stats.small_tokens,
                plain.stats.base_seconds / plain.stats.base_tokens,
                stats.judge_seconds / stats.judged,
                plain.stats.base_tokens / len(plain.steps),
                (middle - start) / (end - middle),
            )
        )
    return Times(*np.median(rows[1:], axis=0).tolist())


# --- the subjects ----------------------------------------------------------------------------------------------------


class RandomJudge:
    """Keeps a share of the steps, whatever they say."""

    def __init__(self, rate: float, seed: int) -> None:
        self.rate, self.seed = rate, seed

    def score(self, problem: Messages, steps: Sequence[str], candidate: str) -> StepScore:
        drawn = random.Random(f"{self.seed} {problem} {len(steps)}").random()
        return StepScore(9.0 if drawn < self.rate else 0.0)


class KnowingJudge:
    """Keeps exactly the right steps."""

    def score(self, problem: Messages, steps: Sequence[str], candidate: str) -> StepScore:
        return StepScore(9.0 if right_step(problem, steps, candidate) else 0.0)


def make_subjects(pair: Pair, chosen: Judged, best: dict[str, Judged], rate: float) -> list[Subject]:
    """The two models alone, the controls, the judges that were not chosen, and the method."""
    makers: dict[str, tuple[str, dict[str, Any], Callable[[int], SpeculativeReasoner]]] = {
        BASE: ("plain", {}, lambda seed: pair.alone()),
        SMALL: ("control", {}, lambda seed: pair.reasoner(RandomJudge(1.0, 0))),
        RANDOM: ("control", {"rate": round(rate, 4)}, lambda seed: pair.reasoner(RandomJudge(rate, seed))),
        ORACLE: ("control", {}, lambda seed: pair.reasoner(KnowingJudge())),
    }
    for way, judged in sorted(best.items(), key=lambda item: item[1] == chosen):
        name = METHOD if judged == chosen else OTHERS.get(way, way)
        setting = {"score_method": way, "threshold": judged[1]}
        makers[name] = ("method", setting, lambda seed, judged=judged: pair.judged(judged))
    return [Subject(name, role, setting, partial(solve, make)) for name, (role, setting, make) in makers.items()]


def solve(make: Callable[[int], SpeculativeReasoner], problems: Sequence[Problem], seed: int) -> list[ReasoningResult]:
    return make(seed).generate_many([problem.question for problem in problems], seed=seed)


# --- afterwards ------------------------------------------------------------------------------------------------------


def judge(comparison: Comparison, times: Times, way: str) -> list[Finding]:
    """Accuracy and tokens against the base model, the controls, the judges, and the clock."""
    gain, fewer = comparison.difference(METHOD, BASE, "accuracy"), saved(comparison)
    over_random = comparison.difference(METHOD, RANDOM, "accuracy")
    over_small = comparison.difference(METHOD, SMALL, "accuracy")
    below = comparison.difference(METHOD, ORACLE, "accuracy")
    kept = acceptance(comparison)
    digits = METHOD if way == "digits" else OTHERS["digits"]
    large = step_speedup(kept, LARGE[1] / LARGE[0], 1.0, VERIFY, times.step_tokens)
    here = step_speedup(kept, times.small, times.base, times.verify, times.step_tokens)
    return [
        Finding(
            f"the base model writes less than half as many tokens, and accuracy falls by no more than {TOLERANCE:.0%}",
            fewer.low > HALF and gain.mean > -TOLERANCE,
            f"judged by {way}: base tokens saved {fewer:.1%}; accuracy {gain:+.1%}; "
            + ", ".join(f"{name} {comparison.mean(name, 'accuracy'):.1%}" for name in (BASE, SMALL, METHOD)),
        ),
        Finding(
            f"the interval of accuracy excludes a loss of {TOLERANCE:.0%}",
            gain.low > -TOLERANCE,
            f"accuracy {gain:+.1%}",
        ),
        Finding(
            "it is the judgment: a random judge that keeps as many steps is worse",
            over_random.low > 0,
            f"accuracy {over_random:+.1%} over the random judge, {over_small:+.1%} over the small model alone, "
            f"{below:+.1%} over the judge that knows; steps kept: {METHOD} {kept:.1%}, "
            f"{RANDOM} {acceptance(comparison, RANDOM):.1%}",
        ),
        *([_digit_judge(comparison, digits)] if digits in comparison.subjects else []),
        Finding(
            f"the clock on single problems says at least {FASTER} times faster",
            times.faster >= FASTER,
            f"measured {times.faster:.2f} times; by the latency model {here:.2f}, from {1e3 * times.small:.2f} and "
            f"{1e3 * times.base:.2f} ms per token of the small and the base model, {1e3 * times.verify:.2f} ms per "
            f"judgment, {times.step_tokens:.1f} tokens per step; for {LARGE[1]:g} and {LARGE[0]:g} billion weights "
            f"it says {large:.2f}",
        ),
    ]


def _digit_judge(comparison: Comparison, digits: str) -> Finding:
    tells = {name: telling(comparison, name) for name in dict.fromkeys((digits, METHOD))}
    gain = comparison.difference(digits, BASE, "accuracy")
    return Finding(
        f"a judge that is asked for a digit, as in the paper, tells right steps from wrong ones (AUC above {TELLS})",
        tells[digits].low > TELLS,
        "; ".join(f"{name}: AUC {one:.3f}" for name, one in tells.items())
        + f"; {digits}: base tokens saved {saved(comparison, digits):.1%}, accuracy {gain:+.1%}, steps kept "
        f"{acceptance(comparison, digits):.1%}",
    )


def saved(comparison: Comparison, subject: str = METHOD) -> Interval:
    """Share of the base model's tokens that it does not write, over all samples."""
    a, b = comparison.values(subject, "base_tokens"), comparison.values(BASE, "base_tokens")
    return bootstrap_statistic(lambda pick: 1 - a[pick].sum() / b[pick].sum(), len(a))


def acceptance(comparison: Comparison, subject: str = METHOD) -> float:
    """Share of all judged steps that were kept."""
    judged = np.nan_to_num(comparison.table(subject)["judged"])
    kept = np.nan_to_num(comparison.table(subject)["acceptance"]) * judged
    return float(kept.sum() / judged.sum())


def telling(comparison: Comparison, subject: str) -> Interval:
    """AUC of the judge's scores over right and wrong steps, with its interval over problems."""
    count = len(comparison.samples)
    scored: list[list[list[float]]] = [[] for _ in range(count)]
    for i, detail in enumerate(comparison.details(subject)):  # seed by seed
        scored[i % count] += detail["scored"]

    def compute(pick: np.ndarray) -> float:
        pairs = np.array([pair for i in pick for pair in scored[i]]).reshape(-1, 2)
        return auroc(pairs[:, 0], pairs[:, 1])

    return bootstrap_statistic(compute, count)
