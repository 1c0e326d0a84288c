"""Does the base model write less than half, at equal accuracy, and is it its judgment that does it?

The judge is the paper's, which is asked for a digit; a judge of ours, by likelihood, has a row and a finding of its
own. Thresholds are chosen on other problems. Against the method stand the base model alone, the small one alone, a
judge that draws its scores at random and keeps as many steps, and one that knows which steps are right.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
from tqdm.auto import tqdm

from ..core.calibration import auroc
from ..core.errors import InputError
from ..data.problems import Arithmetic, Problem, draw_problems
from ..decode.reasoning.scores import StepScore, StepScorer
from ..decode.reasoning.speculative import ReasoningResult, SpeculativeReasoner, step_speedup
from ..decode.reasoning.step_prompts import PRESETS, Messages, prompts_for
from ..decode.specreason import SpecReason
from ..measure.claims import Check, Contrast, Finding, above, all_of, at_least, describe, loses_at_most
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import bootstrap_statistic
from ..measure.task import Arm, Role
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
PAPERS, OURS = "digits", "likelihood"  # ways to judge
NAMES = {PAPERS: "judge asked for a digit", OURS: "judge by likelihood"}
LEVELS = (3, 4, 5, 6)
BUDGET = 256
ALL, NONE = 0.0, 9.5  # thresholds at which every step is kept, and none
THRESHOLDS = {PAPERS: (ALL, 3.0, 4.5, 6.0, 7.0, 8.0), OURS: (1.0, 3.0, 5.0, 7.0)}
CHOSEN_ON, TIMED_ON = 256, 40  # problems of the dev split
TOLERANCE, HALF, FASTER, TELLS = 0.02, 0.5, 1.3, 0.8
LARGE, VERIFY = (32.0, 1.5), 2.0  # billions of weights; tokens of the base model that a judgment is taken to cost


@experiment("specreason", SpecReason, model="zoo/reasoner", samples=320, seeds=(0, 1), batch=64, quick=3, limit=2000)
def build(run: Run[SpecReason]) -> Design:
    """Choose the threshold of each judge on the dev split, with at most as many problems, take times, then compare on
    the test split.

    Small model, prompts, judge and threshold of `method` replace those of this experiment where it sets them.
    """
    pair = Pair(Loaded(run.model, run.tokenizer), SpecReason(**run.given))
    dev = draw_problems(Arithmetic(), min(CHOSEN_ON, max(run.count, 8)), split="dev", levels=LEVELS)
    sweep = sweep_thresholds(pair, dev, run.given)
    way = run.given.get("score_method", PAPERS)
    best = {judge: choose(sweep, judge) for judge in dict.fromkeys((way, OURS))}
    return Design(
        task=StepsTask(draw_problems(Arithmetic(), run.count, levels=LEVELS)),
        arms=make_arms(pair, best, way, sweep[best[way]].acceptance),
        baseline=BASE,
        models={"small": pair.small.model},
        facts={"times": take_times(pair, best[way], dev[:TIMED_ON]), "way": way},
        notes=f"Levels {LEVELS[0]} to {LEVELS[-1]}, at most {BUDGET} tokens, temperature 0.6, top-p 0.95. The judge by "
        "likelihood is ours: the base model's own probability of the step. The judge that knows is a ceiling and no "
        "method.",
        tried=f"Of each judge the threshold with the fewest base tokens on {len(dev)} dev problems, at an accuracy no "
        f"more than {TOLERANCE:.0%} below the base model alone. {describe_sweep(sweep)}",
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
        scorer = SpecReason(score_method=cast(Any, score_method)).scorer(self.base, self.prompts)
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
    ways = dict.fromkeys((given.get("score_method", PAPERS), OURS))
    grid = [
        (way, threshold)
        for way in ways
        for threshold in ([given["threshold"]] if "threshold" in given else THRESHOLDS.get(way, THRESHOLDS[PAPERS]))
    ]
    found = {PLAIN: tried(pair.alone(), problems)}
    return found | {judged: tried(pair.judged(judged), problems) for judged in tqdm(grid, desc="thresholds")}


def choose(sweep: dict[Judged, Tried], way: str) -> Judged:
    """The fewest base tokens among the settings about as accurate as the base model alone, else the most accurate."""
    mine = {judged: one for judged, one in sweep.items() if judged[0] == way}
    good = [judged for judged, one in mine.items() if one.accuracy >= sweep[PLAIN].accuracy - TOLERANCE]
    if not good:
        return max(mine, key=lambda judged: mine[judged].accuracy)
    return min(good, key=lambda judged: mine[judged].base_tokens)


def describe_sweep(sweep: dict[Judged, Tried]) -> str:
    rows = [
        f"{way or 'no step kept'} {threshold:g}: {one.accuracy:.1%}, {one.base_tokens:.1f}, {one.acceptance:.0%}"
        for (way, threshold), one in sweep.items()
    ]
    return f"Threshold: accuracy, base tokens, steps kept: {'; '.join(rows)}."


class Times(NamedTuple):
    """On single problems: seconds per token of each model and per judgment, tokens per step, and how many times faster
    the method is. Of several problems, the medians."""

    small: float
    base: float
    verify: float
    step_tokens: float
    faster: float


def take_times(pair: Pair, chosen: Judged, problems: Sequence[Problem]) -> list[Times]:
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
    return rows[1:]


# --- the arms --------------------------------------------------------------------------------------------------------


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
        return StepScore(9.0 if right_step(cast(str, problem), steps, candidate) else 0.0)


def make_arms(pair: Pair, best: dict[str, Judged], way: str, rate: float) -> list[Arm]:
    """The two models alone, the controls, the judge that is not the method's, and the method."""
    makers: dict[str, tuple[Role, dict[str, Any], Callable[[int], SpeculativeReasoner]]] = {
        BASE: ("plain", {}, lambda seed: pair.alone()),
        SMALL: ("control", {}, lambda seed: pair.reasoner(RandomJudge(1.0, 0))),
        RANDOM: ("control", {"rate": round(rate, 4)}, lambda seed: pair.reasoner(RandomJudge(rate, seed))),
        ORACLE: ("control", {}, lambda seed: pair.reasoner(KnowingJudge())),
    }
    for judge, judged in sorted(best.items(), key=lambda item: item[0] == way):
        name = METHOD if judge == way else NAMES[judge]
        setting = {"score_method": judge, "threshold": judged[1]}
        makers[name] = ("method", setting, lambda seed, judged=judged: pair.judged(judged))
    return [
        Arm(name, role=role, setting=setting, apply=partial(solve, make))
        for name, (role, setting, make) in makers.items()
    ]


def solve(make: Callable[[int], SpeculativeReasoner], problems: Sequence[Problem], seed: int) -> list[ReasoningResult]:
    return make(seed).generate_many([problem.question for problem in problems], seed=seed)


# --- afterwards ------------------------------------------------------------------------------------------------------


@build.findings
def findings(c: Comparison, times: list[Times], way: str) -> list[Finding]:
    """Accuracy and tokens against the base model, the judge, the controls, the judge of ours, and the clock."""
    kept, usual = acceptance(c), Times(*np.median(times, axis=0).tolist())
    here = step_speedup(kept, usual.small, usual.base, usual.verify, usual.step_tokens)
    large = step_speedup(kept, LARGE[1] / LARGE[0], 1.0, VERIFY, usual.step_tokens)
    ours = [name for name in c.arms if name == NAMES[OURS]]
    clock = bootstrap_statistic(lambda pick: float(np.median([times[i].faster for i in pick])), len(times))
    return [
        Finding(
            f"{NAMES.get(way, 'judge by ' + way)}: the base model writes less than half as many tokens, and accuracy "
            f"falls by at most {TOLERANCE:.0%}",
            halves(c, METHOD),
            main=True,
            note=", ".join(f"{name} {c.mean(name, 'accuracy'):.1%}" for name in (BASE, SMALL, METHOD, ORACLE)),
        ),
        Finding("its judge tells right steps from wrong ones", above(telling(c, METHOD), TELLS)),
        Finding(
            "it is the judgment: a random judge that keeps as many steps is worse",
            beats(c, "accuracy", METHOD, [RANDOM], "+.1%"),
            note=f"steps kept: {METHOD} {kept:.1%}, {RANDOM} {acceptance(c, RANDOM):.1%}",
        ),
        *(
            Finding(f"so it does with a {name}, which is ours", halves(c, name), note=str(telling(c, name)))
            for name in ours
        ),
        Finding(
            f"the clock on single problems says at least {FASTER} times faster",
            at_least(Contrast(clock, "times faster, median of single problems", ".2f"), FASTER),
        ),
        describe(
            "what the latency model says",
            f"{here:.2f} times faster, from {1e3 * usual.small:.2f} and {1e3 * usual.base:.2f} ms per token of the "
            f"small and the base model, {1e3 * usual.verify:.2f} ms per judgment, {usual.step_tokens:.1f} tokens per "
            f"step; {large:.2f} if seconds per token went with the weights, {LARGE[1]:g} and {LARGE[0]:g} billion, and "
            f"a judgment took {VERIFY:g} tokens of the base model",
        ),
    ]


def halves(c: Comparison, arm: str) -> Check:
    """Less than half of the base model's tokens, and about its accuracy."""
    gain = c.gap("accuracy", arm, BASE, "+.1%")
    return all_of(above(c.saved("base_tokens", arm, BASE), HALF), loses_at_most(gain, TOLERANCE))


def acceptance(c: Comparison, arm: str = METHOD) -> float:
    """Share of all judged steps that were kept."""
    judged = np.nan_to_num(c.table(arm)["judged"])
    kept = np.nan_to_num(c.table(arm)["acceptance"]) * judged
    return float(kept.sum() / judged.sum())


def telling(c: Comparison, arm: str) -> Contrast:
    """AUC of the judge's scores over right and wrong steps, with its interval over problems."""
    count = len(c.samples)
    scored: list[list[list[float]]] = [[] for _ in range(count)]
    for i, detail in enumerate(c.details(arm)):  # seed by seed
        scored[i % count] += detail["scored"]

    def compute(pick: np.ndarray) -> float:
        pairs = np.array([pair for i in pick for pair in scored[i]]).reshape(-1, 2)
        return auroc(pairs[:, 0], pairs[:, 1])

    return Contrast(bootstrap_statistic(compute, count), f"AUC, {arm}")
