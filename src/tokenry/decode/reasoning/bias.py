"""Logits processors that add a bias to a few tokens until thinking ends.

Everything is computed from the ids of the row, never from a counter: rewinds and unequal rows need no care. A bias is
added to raw logits, before temperature and top-p; it multiplies the odds of a token against any other by exp(bias).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor

from ...core.errors import InputError

__all__ = ["BiasLogitsProcessor", "checked_ids"]


class BiasLogitsProcessor(LogitsProcessor):
    """Adds one number per row to the logits of a few tokens, until the row has ended thinking.

    A bias depends on how many tokens are generated, so the length of the prompt must be known. The decode loop says it
    with `begin` and `end`. In plain `generate` it is `prompt_length`; where that is None, a processor is for one
    generation: its first call has the prompts alone, and every further one has one more column. A prompt that is no
    longer than the one before may follow, since no generation falls below its prompt. A prompt that is the whole output
    before goes on with that generation. Anything else is refused: other longer prompts, and assisted decoding, which
    goes back and forth.

    Args:
        prompt_length: columns of the prompts, padding included; None: those of the first call.
    """

    def __init__(
        self, token_ids: Sequence[int], end_think_ids: Sequence[int] | None, prompt_length: int | None = None
    ) -> None:
        if prompt_length is not None and prompt_length < 1:
            raise InputError(f"prompt_length={prompt_length} is not allowed; give the number of prompt columns, >= 1")
        self.token_ids = tuple(dict.fromkeys(checked_ids("token_ids", token_ids)))  # each biased once
        self.end_think_ids = None if end_think_ids is None else checked_ids("end_think_ids", end_think_ids)
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

    def bias(self, generated: Tensor) -> Tensor:
        """What to add, in logits, for each row of generated ids (batch, t): (batch,), float32."""
        raise NotImplementedError

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (batch, vocab) with the bias added; a new tensor, or `scores` itself where there is no bias."""
        if max(self.token_ids) >= scores.shape[-1]:
            raise InputError(
                f"token id {max(self.token_ids)} is outside the model's vocabulary of {scores.shape[-1]}; "
                "take the ids from this model's tokenizer"
            )
        generated = input_ids[:, self._prompt(input_ids) :]
        bias = self.bias(generated).masked_fill(self._ended(generated), 0.0)
        if not bool(bias.any()):
            return scores
        ids = torch.tensor(self.token_ids, device=scores.device)
        return scores.float().index_add(1, ids, bias[:, None].expand(-1, len(ids)))

    def _prompt(self, input_ids: Tensor) -> int:
        """How many of a call's columns are the prompt."""
        width = input_ids.shape[1]
        if self.seen is None and self.prompt_length is not None:
            if width < self.prompt_length:
                raise InputError(
                    f"prompt_length={self.prompt_length} is more than the {width} tokens given; leave it out"
                )
        elif self.seen is None or width <= self.prompt_length:
            self.prompt_length, self.seen, self.warned = width, input_ids.clone(), False
        else:
            self._follow(input_ids)
        return self.prompt_length

    def _follow(self, input_ids: Tensor) -> None:
        """One more column of the same generation: each row goes on from a row of the call before, for beams any."""
        before, earlier = self.seen, input_ids[:, :-1]
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

    def _ended(self, generated: Tensor) -> Tensor:
        """Rows (batch,) whose generated ids hold the whole end mark. In a prompt it does not count."""
        if self.end_think_ids is None or generated.shape[1] < len(self.end_think_ids):
            return torch.zeros(generated.shape[0], dtype=torch.bool, device=generated.device)
        mark = torch.tensor(self.end_think_ids, device=generated.device)
        return (generated.unfold(1, len(mark), 1) == mark).all(-1).any(-1)


def _rows_in(rows: Tensor, table: Tensor) -> bool:
    """Whether every row of (n, length) is a row of (m, length)."""
    return rows.shape[1] == table.shape[1] and bool((rows[:, None] == table[None]).all(-1).any(1).all())


def checked_ids(name: str, ids: Sequence[int]) -> tuple[int, ...]:
    """The ids in order, as a tuple; refused if there are none or one is negative."""
    if not ids:
        raise InputError(f"{name} is empty; give at least one token id")
    if any(i < 0 for i in ids):
        raise InputError(f"{name} has {min(ids)}; give token ids >= 0")
    return tuple(ids)
