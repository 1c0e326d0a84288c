"""The task `puzzles`: a masked-diffusion model fills windows, and what it reaches is compared at equal quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.problems import Problem, Split, VerifiableTask, draw_problems
from ...data.puzzles import PUZZLES, kind_of
from ...decode.denoising.loop import DiffusionOutput, MaskedDiffusionModel, diffusion_generate
from ...decode.generation.sampler import row_seed
from ...models.prompts import encode_prompts
from ..compare import Comparison
from ..statistics import Interval, bootstrap_statistic
from ..task import Metric, Outcome, Sample, Subject

__all__ = ["LONG", "PuzzleTask", "WindowTask", "cost_at", "cost_ratio", "shown_denoising"]

LEVELS = 11  # qualities at which two frontiers are compared
LONG = 8  # an answer with more tokens is a long one


class PuzzleTask:
    """Puzzles of some kinds by turns, each seed with problems of its own; answers in a window of `width` tokens.

    A subject's `apply` is a function of the width that gives arguments of `diffusion_generate`, new ones for each
    batch, such as `DiffusionMethods([...]).options`. The window is one block, unless they say otherwise. Decoding takes
    the most likely tokens, so seeds differ in their problems, and in the positions that a rule draws. The rows of a
    batch share its seconds.
    """

    slug: ClassVar[str] = "puzzles"
    stage: ClassVar[str] = "decode"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("exact", "higher", "share of answers that are right to the last token"),
        *(Metric(f"exact_{task.name}", "higher", f"the same, {task.name} alone") for task in PUZZLES),
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seeds: Sequence[int],
        count: int = 120,
        width: int = 24,
        kinds: Sequence[VerifiableTask] = PUZZLES,
        split: Split = "test",
    ) -> None:
        self.model, self.tokenizer, self.width = MaskedDiffusionModel(model, tokenizer), tokenizer, width
        each = -(-count // len(kinds))
        self.setting = {"width": width, "kinds": [kind.name for kind in kinds], "split": split}
        drawn = {seed: [draw_problems(task, each, seed, split) for task in kinds] for seed in seeds}
        self.problems = {
            seed: [problems[i % len(kinds)][i // len(kinds)] for i in range(count)] for seed, problems in drawn.items()
        }
        self.first = seeds[0]

    def samples(self) -> list[Sample]:
        return [
            Sample(f"puzzles-{i:03}", problem.question, {"index": i})
            for i, problem in enumerate(self.problems[self.first])
        ]

    def run(self, subject: Subject, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        problems = [self.problems[seed][sample.data["index"]] for sample in samples]
        inputs = encode_prompts(self.tokenizer, [problem.question for problem in problems])
        options = {"gen_length": self.width, "block_length": None, **subject.apply(self.width)}
        own = row_seed(seed, samples[0].data["index"])  # so that each sample draws the same in every batch
        output = diffusion_generate(self.model, **inputs, seed=own, tokenizer=self.tokenizer, **options)
        stats, outcomes = output.stats, []
        for row, problem in enumerate(problems):
            quality = self.quality(problem, output, row)
            cost = {
                "seconds": stats.seconds / len(problems),
                "tokens": stats.effective_tokens[row],
                "forward_passes": stats.nfe[row],
                "tokens_processed": stats.tokens_processed[row],
            }
            verdict = "right" if quality["exact"] else f"wrong: {problem.answer}"
            note = f"{problem.question}{output.texts[row]} ({verdict})"
            detail = {"denoising": shown_denoising(output, row, self.tokenizer), "note": note}
            outcomes.append(Outcome(quality, cost, detail))
        return outcomes

    def quality(self, problem: Problem, output: DiffusionOutput, row: int) -> dict[str, float]:
        """The metrics of a row."""
        task = kind_of(problem)
        right = float(task.check(problem, output.texts[row]))
        return {"exact": right, f"exact_{task.name}": right}


class WindowTask(PuzzleTask):
    """The same puzzles, and what became of the windows; for subjects that choose their width. `width` is the widest."""

    slug: ClassVar[str] = "windows"
    metrics: ClassVar[Sequence[Metric]] = (
        *PuzzleTask.metrics,
        Metric("exact_long", "higher", f"exact match where the answer has more than {LONG} tokens"),
        Metric("useful", "higher", "share of the window before its first end-of-text token"),
        Metric("window", None, "tokens of the window in the end"),
        Metric("answer", None, "tokens of the right answer"),
    )

    def quality(self, problem: Problem, output: DiffusionOutput, row: int) -> dict[str, float]:
        found, width = super().quality(problem, output, row), len(output.windows[row])
        long = {"exact_long": found["exact"]} if len(problem.answer) > LONG else {}
        useful = output.stats.effective_tokens[row] / width
        return {**found, **long, "useful": useful, "window": float(width), "answer": float(len(problem.answer))}


def shown_denoising(output: DiffusionOutput, row: int, tokenizer: PreTrainedTokenizerBase) -> list[list[Any]]:
    """For the report: [text, step, confidence] of each token of a row's window."""
    steps, confidence = output.stats.commit_step[row], output.stats.commit_confidence[row]
    pieces = [tokenizer.decode([token]) for token in output.windows[row]]
    return [[piece, step, round(p, 4)] for piece, step, p in zip(pieces, steps, confidence)]


# --- quality against cost ------------------------------------------------------------------------------------------


def cost_at(points: Sequence[tuple[float, float]], levels: np.ndarray) -> np.ndarray:
    """What each quality costs on the frontier of points (cost, quality), on straight lines between them.

    The frontier are the points that are better than every cheaper one. NaN outside its range.
    """
    kept: list[tuple[float, float]] = []
    for cost, quality in sorted(points, key=lambda p: (p[0], -p[1])):
        if not kept or quality > kept[-1][1]:
            kept.append((cost, quality))
    costs, qualities = np.array(kept).T
    return np.interp(levels, qualities, costs, left=np.nan, right=np.nan)


def cost_ratio(
    comparison: Comparison, first: Sequence[str], second: Sequence[str], cost: str, quality: str
) -> Interval:
    """How much more the subjects `first` cost than `second` at equal quality: a ratio, with its 95 % interval.

    Each group of subjects is a frontier. The ratio is the geometric mean over qualities that both reach, evenly spread
    from the higher of their lowest to the lower of their highest one. The interval is over resampled samples, the same
    for all subjects; NaN where the frontiers have no quality in common.
    """
    tables = {name: comparison.table(name) for name in (*first, *second)}
    return bootstrap_statistic(
        lambda pick: _ratio(
            *([_point(tables[name], pick, cost, quality) for name in group] for group in (first, second))
        ),
        len(comparison.samples),
    )


def _point(table: Mapping[str, np.ndarray], pick: np.ndarray, cost: str, quality: str) -> tuple[float, float]:
    return float(np.nanmean(table[cost][pick])), float(np.nanmean(table[quality][pick]))


def _ratio(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> float:
    # The quality of the cheapest point is the lowest one that a frontier reaches.
    low = max(min(points, key=lambda p: (p[0], -p[1]))[1] for points in (first, second))
    high = min(max(quality for _, quality in points) for points in (first, second))
    if high < low:
        return float("nan")
    levels = np.linspace(low, high, LEVELS)
    return float(np.exp(np.mean(np.log(cost_at(first, levels) / cost_at(second, levels)))))
