"""One sequence of the batch as it grows and shrinks: ids, text, and the scores that a rewind may need."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from copy import copy
from typing import Any, Protocol, TypeVar, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...text.token_text import TokenText
from .logprobs import KnownLogprobs

__all__ = ["SequenceState"]


class Note(Protocol):
    """What a monitor knows of a row's text, so that it need not read it again from the start."""

    def truncate(self, size: int) -> None:
        """The text has only its first `size` characters left."""


N = TypeVar("N", bound=Note)


class SequenceState:
    """One sequence of the batch, as monitors see it. `ids` holds generated tokens only."""

    def __init__(self, number: int, prompt: list[int], tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.number = number
        self.prompt = prompt
        self.ids: list[int] = []
        self.decoded = TokenText(tokenizer, prompt) if tokenizer is not None else None
        self.checked = 0  # characters of the text that monitors have passed
        self.finished = False
        self.cancelled = False
        self.ignored: set[tuple[int, str]] = set()  # (index, rule) given up on
        self.forced: list[tuple[int, int, str]] = []  # (start, stop, rule) of forced tokens
        self.scores: dict[int, Tensor | tuple[Tensor, Tensor]] = {}
        self.known: dict[int, KnownLogprobs] = {}  # by position, where log-probabilities are asked for
        self.tries: dict[int, int] = {}
        self.settled: dict[int, int] = {}  # by length: how many of that many first tokens no rewind can remove
        self.notes: dict[Hashable, Any] = {}
        self.fed = 0
        self.emitted = 0

    @property
    def token_text(self) -> TokenText:
        """`decoded`, for monitors: where there are some, there is a tokenizer."""
        return cast(TokenText, self.decoded)

    @property
    def text(self) -> str:
        """The decoded generated text."""
        return self.decoded.text if self.decoded else ""

    @property
    def starts(self) -> list[int]:
        """Character offset in `text` at which each generated token begins."""
        return self.decoded.starts if self.decoded else []

    def token_at(self, char: int) -> int:
        """The generated token that character `char` of `text` belongs to."""
        return self.token_text.token_at(char)

    def note(self, key: Hashable, make: Callable[[], N]) -> N:
        """What is kept of this row under `key`, made where there is none yet; every rewind truncates it."""
        if key not in self.notes:
            self.notes[key] = make()
        return self.notes[key]

    def append(self, token: int) -> None:
        self.ids.append(token)
        if self.decoded:
            self.decoded.append(token)

    def prefix(self, count: int) -> SequenceState:
        """The first `count` tokens as a row of their own, for monitors that look at them."""
        part = copy(self)
        part.ids = self.ids[:count]
        part.decoded = self.decoded and self.decoded.prefix(count)
        part.notes = {}
        return part

    def truncate(self, count: int) -> None:
        gone = range(count + 1, len(self.ids) + 1)
        del self.ids[count:]
        if self.decoded:
            self.decoded.truncate(count)
        for note in self.notes.values():
            note.truncate(len(self.text))
        self.checked = min(self.checked, len(self.text))
        self.ignored = {key for key in self.ignored if key[0] < count}
        self.forced = [span for span in self.forced if span[1] <= count]
        for store in (self.scores, self.known, self.tries, self.settled):
            for index in gone:
                store.pop(index, None)
        self.finished = False
