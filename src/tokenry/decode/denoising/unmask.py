"""Which predictions of a step are committed: a fixed number, all above a threshold, or what their rank allows.

Papers: LLaDA, arXiv 2502.09992 (fixed number); Fast-dLLM, arXiv 2505.22618 (threshold, factor); Dream 7B, arXiv
2508.15487 (margin and entropy as confidence, drawn positions, each mask by chance); dInfer's rule for runs of masks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...core import fields
from ...core.errors import InputError
from .state import DiffusionState, Edit, Prediction

__all__ = [
    "Confidence",
    "Factor",
    "FixedCount",
    "RandomUnmask",
    "RunAnchors",
    "Threshold",
    "UnmaskPolicy",
    "best_first",
    "transfer_schedule",
]

Confidence = Literal["probability", "margin", "entropy", "random"]
CONFIDENCES: tuple[Confidence, ...] = ("probability", "margin", "entropy", "random")


class UnmaskPolicy:
    """Chooses which of a row's candidates are committed: at least one, sooner or later."""

    def reset(self, state: DiffusionState) -> None:
        """A new generation starts."""

    def select(self, prediction: Prediction, state: DiffusionState) -> Tensor:
        """(batch, time) bool, True only at `state.candidates`."""
        raise NotImplementedError

    def reindex(self, edit: Edit) -> None:
        """Columns have moved: bring what is kept for each column to its new place."""


def best_first(scores: Tensor, candidates: Tensor) -> Tensor:
    """The rank of each candidate (batch, time), 0 for the best; ties go to the lower column. Others come last."""
    order = scores.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    return rank.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))


def transfer_schedule(masks: int, steps: int) -> list[int]:
    """How many of `masks` each of `steps` commits: as even as can be, the larger numbers first (7, 4 -> 2, 2, 2, 1)."""
    base, more = divmod(masks, steps)
    return [base + (i < more) for i in range(steps)]


class FixedCount(UnmaskPolicy):
    """The same number of tokens every step, the best ones (LLaDA, Dream).

    Args:
        steps: forwards for a window of `gen_length`, a multiple of the number of blocks; None: one token per step.
        confidence: what "best" means: the probability of the token, its lead over the second ("margin"), the negative
            entropy of the distribution ("entropy"), or nothing ("random").
        temperature: above 0 the positions are drawn, in proportion to exp(confidence / temperature) (Dream's alg_temp).

    Raises:
        InputError: steps that cannot be shared out among the blocks, an unknown confidence, temperature < 0.
    """

    def __init__(
        self,
        steps: int | None = None,
        confidence: Confidence = "probability",
        temperature: float = 0.0,
    ) -> None:
        if confidence not in CONFIDENCES:
            raise InputError(f"confidence={confidence!r} is unknown; use one of {', '.join(CONFIDENCES)}")
        if steps is not None and steps < 1:
            raise InputError(f"steps={steps} is not allowed; give a number >= 1, or None for one token per step")
        if not 0 <= temperature < float("inf"):
            raise InputError(f"temperature={temperature} is not allowed; give a number >= 0")
        if temperature:
            fields.check("temperature", temperature, fields.Temperature)
        if steps is not None:
            fields.check("steps", steps, fields.Tokens)
        self.steps, self.confidence, self.temperature = steps, confidence, temperature
        self.steps_per_block: Tensor | None = None  # (batch,)

    def reset(self, state: DiffusionState) -> None:
        self.steps_per_block = None if self.steps is None else steps_per_block(self.steps, state)

    def select(self, prediction: Prediction, state: DiffusionState) -> Tensor:
        candidates = state.candidates
        count = torch.ones_like(state.block_step)
        if self.steps_per_block is not None:
            # ceil(masks / steps left) is transfer_schedule step by step, and right after an edit as well.
            left = (self.steps_per_block - state.block_step).clamp(min=1)
            count = -(-candidates.sum(1) // left)
        scores = self._score(prediction, state)
        if self.temperature:
            # The best n of scores with Gumbel noise are n draws without replacement.
            scores = scores / self.temperature - state.uniform().log().neg().log()
        return candidates & (best_first(scores, candidates) < count[:, None])

    def _score(self, prediction: Prediction, state: DiffusionState) -> Tensor:
        if self.confidence == "probability":
            return prediction.confidence
        if self.confidence == "random":
            return state.uniform()
        p = prediction.logits.softmax(-1)
        if self.confidence == "margin":
            first, second = p.topk(2, -1).values.unbind(-1)
            return first - second
        return (p * (p + 1e-10).log()).sum(-1)


def steps_per_block(steps: int, state: DiffusionState) -> Tensor:
    """Steps (batch,) for each block of a row, of `steps` for its window."""
    blocks = -(-state.gen_length // state.block_length)
    if bool((steps % blocks).any()):
        uneven = int(blocks[steps % blocks != 0][0])
        raise InputError(f"steps={steps} is not a multiple of the {uneven} blocks; give one that is")
    return steps // blocks


class RandomUnmask(UnmaskPolicy):
    """Each mask by chance, whatever its confidence, so that all are committed after `steps` (Dream's "origin").

    Step i of n goes from time t to s on an even grid from 1 down to `last`, and commits a mask with probability
    1 - s / t; the last step commits all that are left.

    Raises:
        InputError: steps < 1, or that cannot be shared out among the blocks.
    """

    steps_per_block: Tensor  # (batch,), of a generation

    def __init__(self, steps: int, last: float = 1e-3) -> None:
        if steps < 1:
            raise InputError(f"steps={steps} is not allowed; give a number >= 1")
        fields.check("steps", steps, fields.Tokens)
        if not 0 < last < 1:
            raise InputError(f"last={last} is not allowed; give a time in (0, 1)")
        self.steps, self.last = steps, last

    def reset(self, state: DiffusionState) -> None:
        self.steps_per_block = steps_per_block(self.steps, state)

    def select(self, prediction: Prediction, state: DiffusionState) -> Tensor:
        step = torch.minimum(state.block_step, self.steps_per_block - 1)  # those after the last are like it
        kept = self._time(step + 1) / self._time(step)
        return state.candidates & (state.uniform() >= kept[:, None])

    def _time(self, step: Tensor) -> Tensor:
        """The time (batch,) before a step of a block, and 0 after the last one, which commits everything."""
        time = 1 - (1 - self.last) * step / self.steps_per_block
        return time.masked_fill(step == self.steps_per_block, 0.0)


class Threshold(UnmaskPolicy):
    """Everything at least as confident as `tau`, and always the best one (Fast-dLLM).

    Args:
        tau: >= 0; at 0 everything is committed at once, above 1 only the best one, which is one token per step.

    Raises:
        InputError: tau out of range.
    """

    def __init__(self, tau: float = 0.9) -> None:
        if not tau >= 0:
            raise InputError(f"tau={tau} is not allowed; give a probability in [0, 1], or more for one token per step")
        self.tau = tau

    def select(self, prediction: Prediction, state: DiffusionState) -> Tensor:
        candidates = state.candidates
        confidence = prediction.confidence.masked_fill(~candidates, -torch.inf)
        return candidates & ((confidence >= self.tau) | (best_first(confidence, candidates) == 0))


class Factor(UnmaskPolicy):
    """The most confident n with c_(n) >= 1 - factor / (n + 1), counted as long as none fails; always one (Fast-dLLM).

    The published code commits all when only the last one fails; this one does not.

    Raises:
        InputError: factor <= 0.
    """

    def __init__(self, factor: float = 1.0) -> None:
        if not factor > 0:
            raise InputError(f"factor={factor} is not allowed; give a number > 0")
        fields.check("factor", factor, fields.Positive)
        self.factor = factor

    def select(self, prediction: Prediction, state: DiffusionState) -> Tensor:
        candidates = state.candidates
        confidence = prediction.confidence.masked_fill(~candidates, -torch.inf)
        rank = best_first(confidence, candidates)
        ordered = confidence.sort(dim=1, descending=True, stable=True).values
        n = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
        fits = (ordered >= 1 - self.factor / (n + 1)).long().cumprod(1).sum(1)
        return candidates & (rank < fits.clamp(min=1)[:, None])


class RunAnchors(UnmaskPolicy):
    """Everything at least as confident as `tau`, and the best of each run of masks if it reaches `low` (dInfer).

    Masks that stand together depend on each other most; one of each run can be committed at less confidence. The best
    one of all is committed in any case.

    Raises:
        InputError: not 0 <= low <= tau.
    """

    def __init__(self, tau: float = 0.9, low: float = 0.4) -> None:
        if not 0 <= low <= tau:
            raise InputError(f"low={low} and tau={tau} are not allowed; give 0 <= low <= tau")
        self.tau, self.low = tau, low

    def select(self, prediction: Prediction, state: DiffusionState) -> Tensor:
        candidates = state.candidates
        confidence = prediction.confidence.masked_fill(~candidates, -torch.inf)
        rank = best_first(confidence, candidates)
        # Runs are numbered from 1; the number goes up where a candidate follows what is none.
        before = torch.nn.functional.pad(candidates, (1, 0))[:, :-1]
        run = (candidates & ~before).cumsum(1) * candidates
        best = torch.full_like(rank, rank.shape[1]).scatter_reduce(1, run, rank, "amin")
        leads = rank == best.gather(1, run)
        return candidates & ((confidence >= self.tau) | (leads & (confidence >= self.low)) | (rank == 0))
