"""The seam between the routes and whatever writes the text: a worker with a model of its own, or another server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from transformers import PreTrainedTokenizerBase

from ..core.errors import InputError
from ..decode.contract import DecodeMethod
from ..decode.generation.logprobs import Ranked
from ..models.prompts import Prompt

__all__ = ["Backend", "Broken", "Busy", "FinishReason", "Piece", "Ranked", "Work"]

FinishReason = Literal["stop", "length", "cancelled", "timeout"]


class Busy(InputError):
    """There is no room for another text now; `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Broken(InputError):
    """No text can be written any more."""


@dataclass(frozen=True)
class Work:
    """One text to write.

    Attributes:
        options: what `model.generate` takes of sampling, such as do_sample, temperature and top_p.
        logit_bias: what is added to the scores of tokens, by id.
        logprobs: how many of the likeliest tokens are told beside each one; None for no log-probabilities at all.
        deadline: seconds after which the text ends as it is.
        prompt: the text or conversation that the ids were made of, for methods that read questions rather than ids.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    methods: Sequence[DecodeMethod] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    seed: int | None = None
    logprobs: int | None = None
    deadline: float | None = None
    prompt: Prompt | None = None


@dataclass(frozen=True)
class Piece:
    """What has settled since the last piece: it is never taken back.

    Attributes:
        text: what these tokens add, without special tokens; a character that is not whole comes with its last token,
            what may belong to a stop string when it is known not to, and nothing from a stop string on.
        logprobs: one for each token, where they were asked for.
        offsets: beside each of these, the character of the text at which its token begins.
        finish: why the text has ended, in the last piece alone.
        events: the repairs of the text, as JSON, in the last piece alone.
        reused: how many tokens of the prompt were not read for this text, as they were for another one, in the last
            piece alone; None where that is not known.
    """

    ids: Sequence[int]
    text: str
    logprobs: Sequence[Ranked] = ()
    offsets: Sequence[int] = ()
    finish: FinishReason | None = None
    events: Sequence[Mapping[str, Any]] = ()
    reused: int | None = None


class Backend(Protocol):
    """Writes texts, several at a time.

    Attributes:
        name: of the model, as clients say it.
        tokenizer: of the model.
        window: the most tokens of prompt and text together, where that is known.
        broken: why no text can be written any more; None while there is no such reason.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    window: int | None

    @property
    def broken(self) -> str | None: ...

    def stream(self, work: Work) -> AsyncIterator[Piece]:
        """The pieces of one text. Leaving the iteration frees what it holds.

        Raises:
            InputError: what cannot be done, before the first piece; `Busy` where only the time is wrong, and
                `Broken`, also between pieces, where nothing can be written any more.
        """
        ...

    def numbers(self) -> Mapping[str, float]:
        """What it counts: rows running and waiting, tokens read and written, bytes of its caches."""
        ...

    async def close(self, seconds: float) -> None:
        """Take no further work, let what runs end within these seconds, and end the rest as cancelled."""
        ...
