"""Logits processors that know where the prompt ends, in plain `generate` and in the decode loop."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor

from ...core.errors import InputError

__all__ = ["ContinuationLogitsProcessor"]


class ContinuationLogitsProcessor(LogitsProcessor):
    """Changes scores by what follows the prompt.

    The decode loop says where the prompt ends with `begin` and `end`. In plain `generate` it is `prompt_length`; where
    that is None, a processor is for one generation: its first call has the prompts alone, and every further one has one
    more column. A prompt that is no longer than the one before may follow, since no generation falls below its prompt.
    A prompt that is the whole output before goes on with that generation. Anything else is refused: other longer
    prompts, and assisted decoding, which goes back and forth.

    Args:
        prompt_length: columns of the prompts, padding included; None: those of the first call.
    """

    def __init__(self, prompt_length: int | None = None) -> None:
        if prompt_length is not None and prompt_length < 1:
            raise InputError(f"prompt_length={prompt_length} is not allowed; give the number of prompt columns, >= 1")
        self.given = prompt_length
        self.end()

    def begin(self, prompt_length: int) -> None:
        """A new generation starts; its prompts fill the first `prompt_length` columns."""
        self.prompt_length, self.seen = prompt_length, None

    def end(self) -> None:
        """The generation that `begin` announced is over."""
        self.prompt_length = self.given
        self.seen: Tensor | None = None  # ids of the call before, where nobody says how long the prompts are
        self.warned = False

    def change(self, generated: Tensor, scores: Tensor) -> Tensor:
        """Scores (batch, vocab) for what follows the generated ids (batch, t); a new tensor, or `scores` itself."""
        raise NotImplementedError

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.change(input_ids[:, self._prompt(input_ids) :], scores)

    def _prompt(self, input_ids: Tensor) -> int:
        """How many of a call's columns are the prompt."""
        width, known = input_ids.shape[1], self.prompt_length
        if self.seen is None and known is not None:
            if width < known:
                raise InputError(f"prompt_length={known} is more than the {width} tokens given; leave it out")
            return known
        if self.seen is None or known is None or width <= known:
            self.prompt_length, self.seen, self.warned = width, input_ids.clone(), False
            return width
        self._follow(input_ids, self.seen)
        return known

    def _follow(self, input_ids: Tensor, before: Tensor) -> None:
        """One more column of the same generation: each row goes on from a row of the call before, for beams any."""
        earlier = input_ids[:, :-1]
        in_step = torch.equal(earlier, before)
        if not in_step and not _rows_in(earlier, before):
            raise InputError(
                f"the {input_ids.shape[1]} columns do not go on from the call before, whose prompt had "
                f"{self.prompt_length}; make a new processor for a longer prompt, and give prompt_length for assisted "
                "decoding"
            )
        if not in_step and not self.warned:
            self.warned = True
            warnings.warn(
                "beam search gives log-probabilities; the bias is added to them and they no longer sum to 1. "
                "Set renormalize_logits=True.",
                stacklevel=2,
            )
        self.seen = input_ids.clone()


def _rows_in(rows: Tensor, table: Tensor) -> bool:
    """Whether every row of (n, length) is a row of (m, length)."""
    return rows.shape[1] == table.shape[1] and bool((rows[:, None] == table[None]).all(-1).any(1).all())
