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

from ..core.errors import InputError
from ..data.problems import Arithmetic, Problem, draw_problems
from ..decode.reasoning.scores import StepScore, StepScorer
from ..decode.reasoning.speculative import ReasoningResult, SpeculativeReasoner, step_speedup
from ..decode.reasoning.step_prompts import PRESETS, Messages, prompts_for
from ..decode.specreason import SpecReason
from ..measure.claims import Contrast, Finding, above, all_of, at_least, exactly, loses_at_most
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import bootstrap_statistic
from ..measure.task import Arm
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


@experiment("specreason", SpecReason, model="zoo/reasoner", samples=320, seeds=(0, 1), batch=64, quick=3, limit=2000)
def build(run: Run) -> Design:
    """Choose judge and threshold on the dev split, with at most twice as many problems, take times, then compare on the
    test split.

    Small model, prompts, judge and threshold of `method` replace those of this experiment where it sets them.
    """
    pair = Pair(Loaded(run.model, run.tokenizer), SpecReason(**run.given))
    dev = draw_problems(Arithmetic(), min(CHOSEN_ON, max(2 * run.samples, 8)), split="dev", levels=LEVELS)
    sweep = sweep_thresholds(pair, dev, run.given)
    ways = list(dict.fromkeys(way for way, _ in sweep if way))
    chosen, best = choose(sweep, ways), {way: choose(sweep, [way]) for way in ways}
    return Design(
        task=StepsTask(draw_problems(Arithmetic(), run.samples, levels=LEVELS)),
        arms=make_arms(pair, chosen, best, sweep[chosen].acceptance),
        baseline=BASE,
        models={"small": pair.small.model},
        facts={"times": take_times(pair, chosen, dev[:TIMED_ON]), "way": chosen[0]},
        notes=f"Levels {LEVELS[0]} to {LEVELS[-1]}, at most {BUDGET} tokens, temperature 0.6, top-p 0.95. Judge and "
        f"threshold, {chosen[0]} {chosen[1]:g}, were chosen on {len(dev)} problems of the dev split: the fewest base "
        f"tokens at an accuracy no more than {TOLERANCE:.0%} below the base model alone. The paper asks the judge for "
        "a digit; likelihood is ours, the base model's own probability of the step. "
        + describe_sweep(sweep)
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


def describe_sweep(sweep: dict[Judged, Tried]) -> str:
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
        return StepScore(9.0 if right_step(problem, steps, candidate) else 0.0)


def make_arms(pair: Pair, chosen: Judged, best: dict[str, Judged], rate: float) -> list[Arm]:
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
    return [
        Arm(name, role=role, setting=setting, apply=partial(solve, make))
        for name, (role, setting, make) in makers.items()
    ]


def solve(make: Callable[[int], SpeculativeReasoner], problems: Sequence[Problem], seed: int) -> list[ReasoningResult]:
    return make(seed).generate_many([problem.question for problem in problems], seed=seed)


# --- afterwards ------------------------------------------------------------------------------------------------------


@build.findings
def findings(c: Comparison, times: Times, way: str) -> list[Finding]:
    """Accuracy and tokens against the base model, the controls, the judges, and the clock."""
    gain, kept = c.gap("accuracy", METHOD, BASE, "+.1%"), acceptance(c)
    digits = METHOD if way == "digits" else OTHERS["digits"]
    large = step_speedup(kept, LARGE[1] / LARGE[0], 1.0, VERIFY, times.step_tokens)
    here = step_speedup(kept, times.small, times.base, times.verify, times.step_tokens)
    others = "; ".join(str(c.gap("accuracy", METHOD, name, "+.1%")) for name in (SMALL, ORACLE))
    return [
        Finding(
            f"judged by {way}, the base model writes less than half as many tokens, and accuracy falls by at most "
            f"{TOLERANCE:.0%}",
            all_of(above(c.saved("base_tokens", METHOD, BASE), HALF), loses_at_most(gain, TOLERANCE)),
            main=True,
            note=", ".join(f"{name} {c.mean(name, 'accuracy'):.1%}" for name in (BASE, SMALL, METHOD)),
        ),
        *(_digit_judge(c, digits) if digits in c.arms else []),
        Finding(
            "it is the judgment: a random judge that keeps as many steps is worse",
            beats(c, "accuracy", METHOD, [RANDOM], "+.1%"),
            note=f"{others}; steps kept: {METHOD} {kept:.1%}, {RANDOM} {acceptance(c, RANDOM):.1%}",
        ),
        Finding(
            f"the clock on single problems says at least {FASTER} times faster",
            at_least(exactly(times.faster, "times faster, median of single problems", ".2f"), FASTER),
            note=f"by the latency model {here:.2f}, from {1e3 * times.small:.2f} and {1e3 * times.base:.2f} ms per "
            f"token of the small and the base model, {1e3 * times.verify:.2f} ms per judgment, {times.step_tokens:.1f} "
            f"tokens per step; for {LARGE[1]:g} and {LARGE[0]:g} billion weights it says {large:.2f}",
        ),
    ]


def _digit_judge(c: Comparison, digits: str) -> list[Finding]:
    """The paper's own judge, by the rule of the main finding and as a judge."""
    gain = c.gap("accuracy", digits, BASE, "+.1%")
    return [
        Finding(
            "so it does with a judge that is asked for a digit, as in the paper",
            all_of(above(c.saved("base_tokens", digits, BASE), HALF), loses_at_most(gain, TOLERANCE)),
            note=f"steps kept {acceptance(c, digits):.1%}",
        ),
        Finding(
            "the judge that is asked for a digit tells right steps from wrong ones",
            above(telling(c, digits), TELLS),
            note="" if digits == METHOD else str(telling(c, METHOD)),
        ),
    ]


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
