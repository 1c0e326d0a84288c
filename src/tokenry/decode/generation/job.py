"""What one decode loop has to do: the prompts it continues, how it draws tokens, and when rows end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor

from ...core.errors import InputError

__all__ = ["Job"]

MOST_LOGPROBS = 100  # they are told for every token


@dataclass(frozen=True)
class Job:
    """One generation.

    Attributes:
        input_ids: the prompts (batch, prompt).
        max_new_tokens: the most tokens of a row.
        attention_mask: (batch, prompt), 0 for padding; the last column has none.
        do_sample: draw tokens; else take the most probable ones.
        seed: None uses torch's global generator exactly as `generate` does.
        warpers: temperature, top-k and the like, which only the draw sees.
        budgets: (batch,), limits of single rows below `max_new_tokens`.
        room: (batch,), how many positions the model has left for each row, where that is a limit.
        eos_ids: tokens that end a row.
        stop: texts, or special tokens, that end a row.
        stopping_criteria: end a row when they say so.
        pad_id: what shorter rows of the output are padded with.
        logprobs: how many of the likeliest tokens are told beside each one; None: no log-probabilities at all.
    """

    input_ids: Tensor
    max_new_tokens: int
    attention_mask: Tensor | None = None
    do_sample: bool = False
    seed: int | None = None
    warpers: Sequence[LogitsProcessor] = ()
    budgets: Sequence[int] | None = None
    room: Sequence[int] | None = None
    eos_ids: Sequence[int] = ()
    stop: str | Sequence[str] = ()
    stopping_criteria: Sequence[Callable] = ()
    pad_id: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.input_ids.shape[1] == 0:
            raise InputError("the prompt is empty; give at least one token")
        if self.max_new_tokens <= 0:
            raise InputError(f"max_new_tokens={self.max_new_tokens} leaves nothing to generate; give a number >= 1")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise InputError(f"logprobs={self.logprobs} is not allowed; give a number from 0 to {MOST_LOGPROBS}")
        if self.budgets is not None and (len(self.budgets) != self.rows or min(self.budgets) < 1):
            raise InputError(
                f"budgets={list(self.budgets)} is not allowed for {self.rows} rows; give a number >= 1 for each"
            )

    @property
    def rows(self) -> int:
        return len(self.input_ids)

    @property
    def wanted(self) -> list[int]:
        """How many tokens each row is asked for at most."""
        return [min(self.max_new_tokens, budget) for budget in self.budgets or [self.max_new_tokens] * self.rows]

    @property
    def limits(self) -> list[int]:
        """How many tokens each row can get at most."""
        return list(map(min, self.wanted, self.room or self.wanted))
