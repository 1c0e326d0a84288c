"""Does a window that grows find the length of the answer, and what does that save?

The controls are windows of fixed widths: a short one, the shortest that holds every answer, wider ones, and one that is
as wide as the grown ones on average. Widths handed to other rows say whether it is the fit to the question that counts.
Each stage is left out once. Growing costs forwards of its own, so it is tried where filling takes a forward for every
token, and where a threshold fills a window in two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..decode.daedal import Daedal
from ..decode.denoising.contract import DiffusionMethods
from ..decode.denoising.growth import DaedalLength
from ..decode.denoising.loop import MaskedDiffusionModel
from ..decode.denoising.state import DiffusionState, Edit
from ..decode.denoising.unmask import FixedCount, Threshold
from ..measure.compare import Comparison
from ..measure.task import Experiment, Finding, Statistic, Subject
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


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    method: Daedal | None = None,
) -> Experiment:
    """One token per step and a threshold, each in fixed windows and with DAEDAL, whole and in parts.

    What `method` sets replaces the defaults of this experiment.
    """
    method = Daedal(**{**DEFAULT, **(method.model_dump(exclude_unset=True) if method else {})})
    seeds = tuple(seeds or (0, 1, 2))
    return Experiment(
        slug="daedal",
        claim="A window that starts short and grows ends up as wide as the answer needs: exact match is that of the "
        "best fixed window, at less cost and with fewer useless tokens than in a wide one.",
        task=WindowTask(model, tokenizer, seeds, samples or 180, WIDEST),
        subjects=subjects(method),
        baseline=fixed(WIDEST),
        judge=judge,
        seeds=seeds,
        batch=30,
        statistics=(WIDTHS,),
        notes="Each seed has problems of its own. Seconds are those of a batch of 30, shared by its rows, which wait "
        f"for the slowest one. The longest answer has {FIT} tokens, so that a fixed window of {FIT} knows the task. On "
        "dev problems no factor (4, 8) and no number of tokens to check (2, 4, 6) took fewer token-forwards with a "
        "threshold than the widest window (121 to 135 instead of 95): that is filled in two forwards, and growing "
        "takes two more. Insertions below a confidence of 0.3, 0.5 or 0.8, also with no heed to the end, changed "
        "nothing after growth; alone they brought exact match to 0.603 at most. In a window that is too narrow the "
        "model writes the start of the answer, mostly surely: what is missing is missing at the end.",
    )


def fixed(width: int) -> str:
    return f"threshold, {width}"


def subjects(method: Daedal) -> list[Subject]:
    """Fixed windows, then DAEDAL and its parts. The threshold is that of the method, everywhere."""
    tau = method.high_conf_threshold
    made = [Subject(PLAIN, "plain", {"width": WIDEST}, partial(_window, WIDEST, FixedCount))]
    made += [
        Subject(fixed(n), "control", {"width": n, "threshold": tau}, partial(_window, n, partial(Threshold, tau)))
        for n in FIXED
    ]
    parts = (
        (OTHERS, "control", DaedalWithPermutedWidths(**dict(method))),
        (GROWTH, "control", method.model_copy(update={"low_conf_threshold": 0.0})),
        (INSERTIONS, "control", method.model_copy(update={"eos_confidence_threshold": 0.0, "tail": "none"})),
        (METHOD, "method", method),
    )
    made += [Subject(name, role, one.model_dump(mode="json"), _options(one)) for name, role, one in parts]
    setting = {**method.model_dump(mode="json"), "unmask": "one token per step"}
    stepwise = _options(method)
    return [*made, Subject(STEPWISE, "method", setting, lambda width: {**stepwise(width), "unmask": FixedCount()})]


def _options(method: Daedal) -> Callable[[int], dict[str, Any]]:
    return DiffusionMethods([method]).options


def _window(width: int, unmask: Callable[[], Any], widest: int) -> dict[str, Any]:
    return {"gen_length": width, "unmask": unmask()}


def judge(comparison: Comparison) -> list[Finding]:
    """Widths, quality, cost, use, and what the two stages bring."""
    follows, mean = comparison.interval(METHOD, WIDTHS.name), partial(comparison.mean, METHOD)
    best = max((fixed(n) for n in FIXED), key=lambda name: comparison.mean(name, "exact"))
    quality = comparison.difference(METHOD, best, "exact")
    long = comparison.difference(METHOD, fixed(LONG), "exact_long")
    useful = comparison.difference(METHOD, fixed(WIDEST), "useful")
    against = {name: comparison.difference(METHOD, name, "exact") for name in (fixed(MEAN), OTHERS)}
    stages = {name: comparison.difference(METHOD, name, "exact") for name in (INSERTIONS, GROWTH)}
    return [
        Finding(
            f"the width of the window follows the length of the answer, rank correlation above {FOLLOWS}",
            follows.low > FOLLOWS,
            f"Spearman {follows:.2f}; {_by_kind(comparison)}; mean width {mean('window'):.1f}, mean answer "
            f"{mean('answer'):.1f}",
        ),
        Finding(
            f"exact match is within {MARGIN} of the best fixed window",
            quality.low > -MARGIN,
            f"exact match, daedal - {best}: {quality:+.3f}; "
            + ", ".join(
                f"{n} {comparison.mean(n, 'exact'):.3f}" for n in (PLAIN, *map(fixed, FIXED), METHOD, STEPWISE)
            ),
        ),
        _cheaper(comparison, "one token per step", STEPWISE, PLAIN),
        _cheaper(comparison, "with a threshold", METHOD, fixed(WIDEST)),
        Finding(
            "a larger share of the window is useful than in the widest one",
            useful.low > 0,
            f"useful, daedal - {fixed(WIDEST)}: {useful:+.3f}; "
            + ", ".join(f"{name} {comparison.mean(name, 'useful'):.3f}" for name in (*map(fixed, FIXED), METHOD)),
        ),
        Finding(
            f"long answers, of more than {LONG} tokens, need the growth: a window of {LONG} fails on them",
            long.low > 0.5,
            f"exact match there, daedal - {fixed(LONG)}: {long:+.3f}",
        ),
        Finding(
            "it is the fit to the question: as wide a window on average, and the same widths in other rows, are worse",
            all(difference.low > 0 for difference in against.values()),
            "; ".join(f"exact match, daedal - {name}: {d:+.3f}" for name, d in against.items()),
        ),
        Finding(
            "both stages are needed: exact match falls without either",
            all(difference.low > 0 for difference in stages.values()),
            "; ".join(f"exact match, daedal - {name}: {d:+.3f}" for name, d in stages.items()),
        ),
    ]


def _cheaper(comparison: Comparison, how: str, first: str, second: str) -> Finding:
    cost = comparison.difference(first, second, "tokens_processed")
    share = comparison.mean(first, "tokens_processed") / comparison.mean(second, "tokens_processed")
    calls = [comparison.mean(name, "forward_passes") for name in (first, second)]
    quality = comparison.difference(first, second, "exact")
    return Finding(
        f"{how}, fewer tokens are fed to the model than in a window of {WIDEST}",
        cost.high < 0,
        f"token-forwards {share:.2f} of those of {second}; forwards {calls[0]:.1f} instead of {calls[1]:.1f}; exact "
        f"match {quality:+.3f}",
    )


def _by_kind(comparison: Comparison) -> str:
    """The correlation among puzzles of one kind, where their answers differ in length."""
    table = comparison.table(METHOD)
    kinds = [name for name in table if name.startswith("exact_") and name != "exact_long"]
    found = {kind.removeprefix("exact_"): _within(table, ~np.isnan(table[kind])) for kind in kinds}
    return "within " + ", ".join(f"{kind} {value:.2f}" for kind, value in found.items() if not np.isnan(value))


def _within(table: Mapping[str, np.ndarray], rows: np.ndarray) -> float:
    return spearman(table["window"][rows], table["answer"][rows])
