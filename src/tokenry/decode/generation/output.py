"""What a generation gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from transformers.utils.generic import ModelOutput

from .logprobs import Ranked
from .monitor import RewindEvent

__all__ = ["UNSET", "DecodeOutput", "RunStats"]


UNSET: Any = None  # a ModelOutput wants None as default of its fields; a run sets those that are not optional


class RunStats(Protocol):
    """What a method has counted besides forwards and tokens."""

    def summary(self) -> dict[str, Any]:
        """The counts, for JSON."""
        ...

    def in_words(self) -> str | None:
        """What the command line says; None: nothing."""
        ...


@dataclass
class DecodeOutput(ModelOutput):
    """Result of a generation. `sequences` (batch, prompt + new) is padded on the right as `generate` pads; `new_ids`
    and `prompt_ids` are the same without any padding, a list per row. `texts` are None without a tokenizer.
    `stop_reasons` says why each row ended: "finished" by itself or a stop string, "budget" after as many tokens as were
    asked for, "context": the model has no more positions, or "cancelled". `logprobs` are those of each row's tokens,
    where they were asked for. Where a method has read the prompts first, `strategy` names how it answers each row, and
    `probs` (batch, strategies) is what it chose by. `stats` is what a method has counted."""

    sequences: Tensor = UNSET
    new_ids: list[list[int]] = UNSET
    prompt_ids: list[list[int]] = UNSET
    texts: list[str] = UNSET
    events: list[RewindEvent] = UNSET
    forward_calls: int = UNSET
    tokens_processed: int = UNSET
    past_key_values: Any = None
    stop_reasons: list[str] | None = None
    logprobs: list[list[Ranked]] | None = None
    strategy: list[str] | None = None
    probs: Tensor | None = None
    stats: RunStats | None = None

    @property
    def pairs(self) -> list[dict[str, Any]]:
        """Preference data from the rewinds: context, the rejected token with the text that went with it, and the
        candidates at its place.

        A soft ban may draw the rejected token again; that is no preference and left out.
        """
        return [
            {
                "context_ids": e.context_ids,
                "rejected": e.rejected[0],
                "rejected_text": e.rejected_text,
                "chosen": e.replacement[0],
                "candidates": e.candidates,
                "rule": e.rule,
            }
            for e in self.events or []
            if e.kind == "rewind" and e.rejected and e.replacement and e.rejected[0] != e.replacement[0]
        ]
