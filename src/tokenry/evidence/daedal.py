"""Does a window that grows find the length of the answer, and what does that save?

The controls are windows of fixed widths: a short one, the shortest that holds every answer, wider ones, and one that is
as wide as the grown ones on average. Widths handed to other rows say whether it is the fit to the question that counts.
Each stage is left out once. Growing costs forwards of its own, so it is tried where filling takes a forward for every
token, and where a threshold fills a window in two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from ..decode.daedal import Daedal
from ..decode.denoising.contract import DiffusionMethods
from ..decode.denoising.growth import DaedalLength
from ..decode.denoising.loop import MaskedDiffusionModel
from ..decode.denoising.state import DiffusionState, Edit
from ..decode.denoising.unmask import FixedCount, Threshold
from ..measure.claims import Finding, above, below, loses_at_most
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.task import Arm, Statistic
from ..measure.tasks.denoising import LONG, WindowTask
from ..measure.tasks.sts import spearman

# Chosen on 300 dev problems. Factors 4 and 8 with 2, 4 and 6 tokens to check differ by 0.01 at most in exact match.
# With 4 and 4 the windows follow the answers closely, and are no wider on average than the longest answer. Alone,
# insertions are best below 0.8, of 0.3, 0.5 and 0.8.
DEFAULT = {
    "initial_gen_length": 8,
    "max_gen_length": 32,
    "expansion_factor": 4,
    "low_conf_threshold": 0.8,
    "eos_check_tokens": 4,
}
WIDEST = 32
FIXED = (8, 15, 16, 24, 32)  # 15 is the mean width of DAEDAL's windows on those dev problems
MEAN, FIT = 15, 16  # the second is the longest answer
PLAIN, METHOD, STEPWISE = "one token per step, 32", "daedal", "one token per step, daedal"
OTHERS, GROWTH, INSERTIONS = "widths of other rows", "without insertions", "without growth"
MARGIN = 0.02  # of exact match
FOLLOWS = 0.8  # correlation of widths and lengths


class PermutedWidths(DaedalLength):
    """Each row gets the width that another one has grown to, drawn at random."""

    def grow(self, model: MaskedDiffusionModel, state: DiffusionState) -> None:
        super().grow(model, state)
        order = torch.randperm(len(state.gen_length), generator=torch.Generator().manual_seed(0))
        state.apply(Edit.resize(state, state.gen_length[order.to(state.gen_length.device)]))


class DaedalWithPermutedWidths(Daedal):
    """DAEDAL with the widths of other rows."""

    policy: ClassVar[type[DaedalLength]] = PermutedWidths


WIDTHS = Statistic(
    "spearman",
    "higher",
    "rank correlation of the width of the window with the length of the right answer; none for fixed widths",
    lambda table: spearman(table["window"], table["answer"]),
)


@experiment(
    "daedal",
    Daedal,
    model="zoo/denoiser",
    samples=180,
    seeds=(0, 1, 2),
    batch=30,
    quick=6,
    limit=720,
    claim="A window that starts short and grows ends up as wide as the answer needs: exact match is that of the best "
    "fixed window, at less cost and with fewer useless tokens than in a wide one.",
)
def build(run: Run) -> Design:
    """One token per step and a threshold, each in fixed windows and with DAEDAL, whole and in parts.

    What `method` sets replaces the defaults of this experiment.
    """
    return Design(
        task=WindowTask(run.model, run.tokenizer, run.seeds, run.samples, WIDEST),
        arms=arms(run.settings(Daedal, **DEFAULT)),
        baseline=fixed(WIDEST),
        statistics=(WIDTHS,),
        notes="Each seed has problems of its own. Seconds are those of a batch of 30, shared by its rows, which wait "
        f"for the slowest one. The longest answer has {FIT} tokens, so that a fixed window of {FIT} knows the task. In "
        "a window that is too narrow the model writes the start of the answer, mostly surely: what is missing is "
        "missing at the end.",
        tried="On dev problems no factor (4, 8) and no number of tokens to check (2, 4, 6) took fewer token-forwards "
        "with a threshold than the widest window (121 to 135 instead of 95): that is filled in two forwards, and "
        "growing takes two more. Insertions below a confidence of 0.3, 0.5 or 0.8, also with no heed to the end, "
        "changed nothing after growth; alone they brought exact match to 0.603 at most.",
    )


def fixed(width: int) -> str:
    return f"threshold, {width}"


def arms(method: Daedal) -> list[Arm]:
    """Fixed windows, then DAEDAL and its parts. The threshold is that of the method, everywhere."""
    tau = method.high_conf_threshold
    window = {n: partial(_window, n, partial(Threshold, tau)) for n in FIXED}
    setting = {**method.model_dump(mode="json"), "unmask": "one token per step"}
    stepwise = DiffusionMethods([method]).options
    return [
        Arm(PLAIN, role="plain", setting={"width": WIDEST}, apply=partial(_window, WIDEST, FixedCount)),
        *(
            Arm(fixed(n), role="control", setting={"width": n, "threshold": tau}, apply=apply)
            for n, apply in window.items()
        ),
        Arm(OTHERS, DaedalWithPermutedWidths(**dict(method)), "control"),
        Arm(GROWTH, method.model_copy(update={"low_conf_threshold": 0.0}), "control"),
        Arm(INSERTIONS, method.model_copy(update={"eos_confidence_threshold": 0.0, "tail": "none"}), "control"),
        Arm(METHOD, method),
        Arm(STEPWISE, setting=setting, apply=lambda width: {**stepwise(width), "unmask": FixedCount()}),
    ]


def _window(width: int, unmask: Callable[[], Any], widest: int) -> dict[str, Any]:
    return {"gen_length": width, "unmask": unmask()}


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """Widths, quality, cost, use, and what the two stages bring."""
    best = max((fixed(n) for n in FIXED), key=lambda name: c.mean(name, "exact"))
    exact = ", ".join(f"{n} {c.mean(n, 'exact'):.3f}" for n in (PLAIN, *map(fixed, FIXED), METHOD, STEPWISE))
    useful = ", ".join(f"{n} {c.mean(n, 'useful'):.3f}" for n in (*map(fixed, FIXED), METHOD))
    widths = f"mean width {c.mean(METHOD, 'window'):.1f}, mean answer {c.mean(METHOD, 'answer'):.1f}"
    return [
        Finding(
            "the width of the window follows the length of the answer",
            above(c.value(WIDTHS.name, METHOD, ".2f"), FOLLOWS),
            main=True,
            note=f"{_by_kind(c)}; {widths}",
        ),
        Finding(
            f"exact match falls by at most {MARGIN} against the best fixed window",
            loses_at_most(c.gap("exact", METHOD, best), MARGIN),
            note=exact,
        ),
        _cheaper(c, "one token per step", STEPWISE, PLAIN),
        _cheaper(c, "with a threshold", METHOD, fixed(WIDEST)),
        Finding(
            "a larger share of the window is useful than in the widest one",
            above(c.gap("useful", METHOD, fixed(WIDEST)), 0),
            note=useful,
        ),
        Finding(
            f"long answers, of more than {LONG} tokens, need the growth: a window of {LONG} fails on them",
            above(c.gap("exact_long", METHOD, fixed(LONG)), 0.5),
        ),
        Finding(
            "it is the fit to the question: as wide a window on average, and the same widths in other rows, are worse",
            beats(c, "exact", METHOD, [fixed(MEAN), OTHERS]),
        ),
        Finding(
            "both stages are needed: exact match falls without either",
            beats(c, "exact", METHOD, [INSERTIONS, GROWTH]),
        ),
    ]


def _cheaper(c: Comparison, how: str, arm: str, than: str) -> Finding:
    return Finding(
        f"{how}, fewer tokens are fed to the model than in a window of {WIDEST}",
        below(c.ratio("tokens_processed", arm, than), 1),
        note=f"{c.ratio('forward_passes', arm, than)}; {c.gap('exact', arm, than)}",
    )


def _by_kind(c: Comparison) -> str:
    """The correlation among puzzles of one kind, where their answers differ in length."""
    table = c.table(METHOD)
    kinds = [name for name in table if name.startswith("exact_") and name != "exact_long"]
    found = {kind.removeprefix("exact_"): _within(table, ~np.isnan(table[kind])) for kind in kinds}
    return "within " + ", ".join(f"{kind} {value:.2f}" for kind, value in found.items() if not np.isnan(value))


def _within(table: Mapping[str, np.ndarray], rows: np.ndarray) -> float:
    return spearman(table["window"][rows], table["answer"][rows])
