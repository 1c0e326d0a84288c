"""What watches a sequence: violations, the repairs they ask for, and how much may still be taken back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

from transformers import PreTrainedTokenizerBase

from .sequence import SequenceState

__all__ = ["Monitor", "ReadsText", "RewindEvent", "Violation"]


@dataclass(frozen=True)
class Violation:
    """What a monitor rejects, and the repair it asks for.

    Attributes:
        index: generated position to go back to; `len(row.ids)` appends without going back.
        rule: name of the rule, for events and for the set of rules given up on.
        factors: {token id: factor on its probability at `index`}; 0 is a hard ban.
        force: tokens to append there instead of sampling.
        span: (start, stop) characters of the generated text that caused it.
        invert: sample the replacement with the surviving candidates' ranking turned around.
        retries: repairs allowed at one position before giving up (or relaxing).
        relax: on giving up, drop temperature, min-p, top-p and top-k one after the other first.
    """

    index: int
    rule: str
    factors: dict[int, float] = field(default_factory=dict)
    force: Sequence[int] = ()
    span: tuple[int, int] | None = None
    invert: bool = False
    retries: int = 100
    relax: bool = False

    @property
    def soft(self) -> bool:
        """Whether it lowers tokens and bans none."""
        return bool(self.factors) and min(self.factors.values()) > 0


class Monitor(Protocol):
    """Watches a row and reports the earliest problem. Deterministic; asks for finitely many repairs."""

    def check(self, row: SequenceState) -> Violation | None: ...

    def hold(self, row: SequenceState) -> int | None: ...


@runtime_checkable
class ReadsText(Protocol):
    """A monitor that is given the tokenizer before a generation."""

    def begin(self, tokenizer: PreTrainedTokenizerBase) -> None: ...


@dataclass
class RewindEvent:
    """One repair. `kind` is "rewind", "kept" (a soft ban the model overrode) or "given up"."""

    row: int
    index: int
    kind: str
    rule: str
    rejected: list[int]
    rejected_text: str
    replacement: list[int]
    candidates: list[tuple[int, float]]  # (token id, probability) after the repair, best first
    context_ids: list[int]  # prompt and generated tokens before `index`


def held_tokens(row: SequenceState, monitors: Sequence[Monitor], known: dict[int, int] | None = None) -> int:
    """How many of the row's newest tokens a rewind may still take back.

    What one rewind takes back can be followed by other tokens than now, so that a pattern that begins before them
    comes alive again: the question is asked once more for the tokens before, until nothing more is held.

    Args:
        known: {length: tokens that are settled}, answers for beginnings of the row; new ones are added.
    """
    known = {} if known is None else known
    asked, count = [], len(row.ids)
    while count > 0 and count not in known:
        asked.append(count)
        view = row if count == len(row.ids) else row.prefix(count)
        held = [monitor.hold(view) for monitor in monitors]
        more = count if None in held else max(cast(list[int], held), default=0)
        if more == 0:
            known[count] = count
        count = max(count - more, 0)
    settled = known.get(count, 0)
    known.update(dict.fromkeys(asked, settled))
    return len(row.ids) - settled
