"""Does a window that grows find the length of the answer, and what does that save?

The controls are windows of fixed widths: a short one, the shortest that holds every answer, wider ones, and one that is
as wide as the grown ones on average. Widths handed to other rows say whether it is the fit to the question that counts.
Each stage is left out once. Growing costs forwards of its own, so it is tried where filling takes a forward for every
token, and where a threshold fills a window in two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any, ClassVar

import numpy as np
import torch

from ..core.calibration import spearman
from ..data.puzzles import Addition, Listing, Sorting
from ..decode.daedal import Daedal
from ..decode.denoising.contract import DiffusionMethods
from ..decode.denoising.growth import DaedalLength
from ..decode.denoising.loop import MaskedDiffusionModel
from ..decode.denoising.state import DiffusionState, Edit
from ..decode.denoising.unmask import FixedCount, Threshold
from ..measure.claims import Finding, above, all_of, below, describe, loses_at_most
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.task import Arm, Statistic
from ..measure.tasks.denoising import LONG, WindowTask, on_dev

DEFAULT = {"block_length": 96, "initial_gen_length": 8, "max_gen_length": 96}
FACTORS, CHECKS, LOWS = (4, 8), (2, 4, 6), (0.1, 0.3, 0.5, 0.8)  # chosen from on dev problems
DEV, BATCH = 360, 60
WIDEST, FIT = 96, 40  # the second is the longest answer
FIXED = (8, LONG, FIT, 64, WIDEST)
VARIED = (Sorting.name, Listing.name)  # kinds whose answers differ in length, and do not all fit in the first window
PLAIN, METHOD, STEPWISE = "one token per step, 96", "daedal", "one token per step, daedal"
OTHERS, GROWTH, INSERTIONS = "widths of other rows", "without insertions", "without growth"
BEFORE = (
    "Measured before on zoo/denoiser, whose answers have at most 16 tokens, in windows of up to 32: there sums were "
    "part of the main finding, which failed on them alone, and with a threshold DAEDAL fed more tokens than the widest "
    "window."
)
MARGIN = 0.02  # of exact match
FOLLOWS = 0.5  # correlation of widths and lengths within a kind


class PermutedWidths(DaedalLength):
    """Each row gets the width that another one has grown to, drawn at random."""

    def grow(self, model: MaskedDiffusionModel, state: DiffusionState) -> None:
        super().grow(model, state)
        order = torch.randperm(len(state.gen_length), generator=torch.Generator().manual_seed(0))
        state.apply(Edit.resize(state, state.gen_length[order.to(state.gen_length.device)]))


class DaedalWithPermutedWidths(Daedal):
    """DAEDAL with the widths of other rows."""

    policy: ClassVar[type[DaedalLength]] = PermutedWidths


def following(kind: str = "") -> Statistic:
    """Whether windows are as wide as answers are long, among puzzles of one kind or all."""

    def compute(table: Any) -> float:
        rows = ~np.isnan(table[f"exact_{kind}" if kind else "exact"])
        return spearman(table["window"][rows], table["answer"][rows]) if rows.sum() > 2 else float("nan")

    what = "rank correlation of the width of the window with the length of the right answer; none for fixed widths"
    name, where = (f"spearman_{kind}", f"the same, {kind} alone") if kind else ("spearman", what)
    return Statistic(name, "higher", where, compute)


@experiment(
    "daedal",
    Daedal,
    model="zoo/denoiser-2",
    samples=180,
    seeds=(0, 1, 2),
    batch=BATCH,
    quick=8,
    limit=360,
    claim="A window that starts short and grows ends up as wide as the answer needs: exact match is that of the best "
    "fixed window, at less cost and with fewer useless tokens than in a wide one.",
)
def build(run: Run[Daedal]) -> Design:
    """One token per step and a threshold, each in fixed windows and with DAEDAL, whole and in parts.

    What `method` sets is not chosen but taken.
    """
    dev = WindowTask(run.model, run.tokenizer, (0,), min(run.count, DEV), WIDEST, split="dev")
    method, mean, tried = choose(dev, run.settings(Daedal, **DEFAULT), run.given)
    return Design(
        task=WindowTask(run.model, run.tokenizer, run.seeds, run.count, WIDEST),
        arms=arms(method, mean),
        baseline=fixed(WIDEST),
        statistics=(following(), *map(following, (Addition.name, *VARIED))),
        facts={"mean": mean},
        notes=f"Each seed has problems of its own. Seconds are those of a batch of {BATCH}, shared by its rows. The "
        f"longest answer has {FIT} tokens, so that a fixed window of {FIT} knows the task. Sums have at most 7 tokens, "
        "and the first window holds them all. In a window that is too narrow the model writes the start of the answer, "
        "mostly surely: what is missing is missing at the end.",
        tried=f"{BEFORE} {tried}",
    )


def choose(dev: WindowTask, method: Daedal, given: dict[str, Any]) -> tuple[Daedal, int, str]:
    """The method with settings chosen on dev problems, the mean width of its windows there, and what was tried.

    Growth: the fewest token-forwards of what loses at most half the margin against the best. Insertions: the best
    exact match when they are alone.
    """
    grid = {
        f"factor {factor}, {check} checked": {"expansion_factor": factor, "eos_check_tokens": check}
        for factor, check in product(FACTORS, CHECKS)
    }
    settings = {name: method.model_copy(update={**own, **given}) for name, own in grid.items()}
    c = on_dev(dev, [Arm(name, one) for name, one in settings.items()], BATCH)
    exact = {name: c.mean(name, "exact") for name in grid}
    cost = {name: c.mean(name, "tokens_processed") for name in grid}
    best = min((name for name in grid if exact[name] >= max(exact.values()) - MARGIN / 2), key=lambda name: cost[name])
    alone = {low: {"low_conf_threshold": low, "eos_confidence_threshold": 0.0, "tail": "none"} for low in LOWS}
    lone = on_dev(dev, [Arm(f"{low}", settings[best].model_copy(update=own)) for low, own in alone.items()], BATCH)
    found = {low: lone.mean(f"{low}", "exact") for low in LOWS}
    low = max(found, key=lambda low: found[low])
    shown = "; ".join(f"{name}: {exact[name]:.3f} for {cost[name]:.0f}" for name in grid)
    return (
        settings[best].model_copy(update={"low_conf_threshold": low, **given}),
        round(c.mean(best, "window")),
        f"On {len(dev.samples())} dev problems, which every run computes, exact match for token-forwards was {shown}. "
        f"Taken is {best}, the cheapest of those within {MARGIN / 2} of the best. Insertions alone, below confidences "
        f"of {', '.join(f'{low}: {value:.3f}' for low, value in found.items())}; taken is {low}.",
    )


def fixed(width: int) -> str:
    return f"threshold, {width}"


def arms(method: Daedal, mean: int = FIT - 1) -> list[Arm]:
    """Fixed windows, one of them of the mean width, then DAEDAL and its parts, all with the method's threshold."""
    tau = method.high_conf_threshold
    window = {n: partial(_window, n, partial(Threshold, tau)) for n in sorted({*FIXED, mean})}
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
        Arm(STEPWISE, setting=setting, apply=lambda width, seed: {**stepwise(width), "unmask": FixedCount()}),
    ]


def _window(width: int, unmask: Callable[[], Any], widest: int, seed: int) -> dict[str, Any]:
    return {"gen_length": width, "unmask": unmask()}


@build.findings
def findings(c: Comparison, mean: int) -> list[Finding]:
    """Widths, quality, cost, use, and what the two stages bring."""
    windows = [name for name in c.arms if name.startswith("threshold, ")]
    best = max(windows, key=lambda name: c.mean(name, "exact"))
    exact = ", ".join(f"{n} {c.mean(n, 'exact'):.3f}" for n in (PLAIN, *windows, METHOD, STEPWISE))
    useful = ", ".join(f"{n} {c.mean(n, 'useful'):.3f}" for n in (*windows, METHOD))
    widths = f"mean width {c.mean(METHOD, 'window'):.1f}, mean answer {c.mean(METHOD, 'answer'):.1f}"
    return [
        Finding(
            "among puzzles of one kind, not all within the first window, its width follows the length of the answer",
            all_of(*(above(c.value(following(kind).name, METHOD, ".2f"), FOLLOWS) for kind in VARIED)),
            main=True,
            note=f"{c.value('spearman', METHOD, '.2f')} of all kinds; {widths}",
        ),
        Finding(
            "and among sums, which all fit in the first window",
            above(c.value(following(Addition.name).name, METHOD, ".2f"), FOLLOWS),
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
            beats(c, "exact", METHOD, [fixed(mean), OTHERS]),
        ),
        describe(
            f"beside a window of {FIT}, which knows the task", str(c.ratio("tokens_processed", METHOD, fixed(FIT)))
        ),
        describe("either stage alone", "; ".join(str(c.gap("exact", METHOD, arm)) for arm in (INSERTIONS, GROWTH))),
    ]


def _cheaper(c: Comparison, how: str, arm: str, than: str) -> Finding:
    return Finding(
        f"{how}, fewer tokens are fed to the model than in a window of {WIDEST}",
        below(c.ratio("tokens_processed", arm, than), 1),
        note=f"{c.ratio('forward_passes', arm, than)}; {c.gap('exact', arm, than)}",
    )
