"""The task `puzzles`: a masked-diffusion model fills windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.problems import Problem, Split, VerifiableTask, draw_problems
from ...data.puzzles import LISTING, PUZZLES, Sudoku, kind_of
from ...decode.denoising.contract import DiffusionMethods
from ...decode.denoising.loop import DiffusionOutput, MaskedDiffusionModel, diffusion_generate
from ...decode.generation.sampler import row_seed
from ...models.prompts import encode_prompts
from ..compare import Comparison, compare
from ..experiment import Experiment
from ..task import Arm, Metric, Outcome, Sample

__all__ = ["LONG", "PuzzleTask", "SudokuTask", "WindowTask", "on_dev", "shown_denoising"]

LONG = 16  # an answer with more tokens is a long one


class PuzzleTask:
    """Puzzles of some kinds by turns, each seed with problems of its own; answers in a window of `width` tokens.

    An arm has a method, or an `apply`: a function of the width and the seed that gives arguments of
    `diffusion_generate`, new ones for each batch. The window is one block, unless they say otherwise. Decoding takes
    the most likely tokens, so seeds differ in their problems, in the positions that a rule draws, and in what an arm
    has trained with them. The rows of a batch share its seconds.
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

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        problems = [self.problems[seed][sample.data["index"]] for sample in samples]
        inputs = encode_prompts(self.tokenizer, [problem.question for problem in problems])
        own = (
            DiffusionMethods([cast(Any, arm.method)]).options(self.width) if arm.method else arm.apply(self.width, seed)
        )
        options = {"gen_length": self.width, "block_length": None, **own}
        first = row_seed(seed, samples[0].data["index"])  # so that each sample draws the same in every batch
        output = diffusion_generate(self.model, **inputs, seed=first, tokenizer=self.tokenizer, **options)
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


class SudokuTask(PuzzleTask):
    """Sudokus alone, and those with one solution by themselves."""

    slug: ClassVar[str] = "sudokus"
    metrics: ClassVar[Sequence[Metric]] = (
        PuzzleTask.metrics[0],
        Metric("exact_unique", "higher", "the same, sudokus with one solution alone"),
    )

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *given: Any, **more: Any) -> None:
        super().__init__(model, tokenizer, *given, kinds=(Sudoku(),), **more)

    def quality(self, problem: Problem, output: DiffusionOutput, row: int) -> dict[str, float]:
        solutions = Sudoku().solutions(problem)
        right = float(output.texts[row].strip() in solutions)
        return {"exact": right, **({"exact_unique": right} if len(solutions) == 1 else {})}


class WindowTask(PuzzleTask):
    """These puzzles and lists, and what became of the windows; for arms that choose their width.

    `width` is the widest.
    """

    slug: ClassVar[str] = "windows"
    metrics: ClassVar[Sequence[Metric]] = (
        *PuzzleTask.metrics,
        Metric(f"exact_{LISTING.name}", "higher", f"the same, {LISTING.name} alone"),
        Metric("exact_long", "higher", f"exact match where the answer has more than {LONG} tokens"),
        Metric("useful", "higher", "share of the window before its first end-of-text token"),
        Metric("window", None, "tokens of the window in the end"),
        Metric("answer", None, "tokens of the right answer"),
    )

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *given: Any, **more: Any) -> None:
        super().__init__(model, tokenizer, *given, kinds=(*PUZZLES, LISTING), **more)

    def quality(self, problem: Problem, output: DiffusionOutput, row: int) -> dict[str, float]:
        found, width = super().quality(problem, output, row), len(output.windows[row])
        long = {"exact_long": found["exact"]} if len(problem.answer) > LONG else {}
        useful = output.stats.effective_tokens[row] / width
        return {**found, **long, "useful": useful, "window": float(width), "answer": float(len(problem.answer))}


def on_dev(task: PuzzleTask, arms: Sequence[Arm], batch: int) -> Comparison:
    """What arms are worth on the dev problems of a task, to choose settings by."""
    return compare(Experiment("dev", "", task, arms, arms[0].name, lambda c: [], batch=batch))


def shown_denoising(output: DiffusionOutput, row: int, tokenizer: PreTrainedTokenizerBase) -> list[list[Any]]:
    """For the report: [text, step, confidence] of each token of a row's window."""
    steps, confidence = output.stats.commit_step[row], output.stats.commit_confidence[row]
    pieces = [tokenizer.decode([token]) for token in output.windows[row]]
    return [[piece, step, round(p, 4)] for piece, step, p in zip(pieces, steps, confidence)]
