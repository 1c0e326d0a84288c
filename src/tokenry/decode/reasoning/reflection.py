"""What methods for reasoning models share: reflection words and end marks as token ids, and logits processors that act
until thinking ends.

Everything is computed from the ids of the row, never from a counter: rewinds and unequal rows need no care. A bias is
added to raw logits, before temperature and top-p; it multiplies the odds of a token against any other by exp(bias).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator, Field, PrivateAttr, model_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessor

from ...core.errors import InputError
from ...core.fields import TokenId
from ...core.method import Lines
from ...text.words import listed
from ..contract import LoopMethod, Plugins

__all__ = ["REFLECTION_WORDS", "BiasLogitsProcessor", "ReflectionMethod", "end_think_ids", "reflection_token_ids"]

REFLECTION_WORDS = ("wait", "Wait", "but", "But", "Alternatively")


# --- tokens ----------------------------------------------------------------------------------------------------


def reflection_token_ids(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str] = REFLECTION_WORDS, leading_space: bool = True
) -> list[int]:
    """The token ids of the words, each once, in order.

    Args:
        words: each must be one token. A word that begins with a space is taken as it is.
        leading_space: also the form after a space (" wait"), which is the usual one inside a sentence. The official
            code has only the forms without it.

    Raises:
        InputError: no words, or a form that is not exactly one token; its pieces are shown.
    """
    words = listed(words, "reflection word")
    check_words(words)
    forms = [form for word in words for form in ((word, " " + word) if leading_space and word[0] != " " else (word,))]
    ids: dict[int, None] = {}
    for form in forms:
        pieces = _pieces(tokenizer, form)
        if len(pieces) != 1:
            hint = " or leave out its form after a space (leading_space=False)" if form not in words else ""
            raise InputError(f"{form!r} is not one token here but {_show(pieces)}; choose another word{hint}")
        ids.update(pieces)
    return list(ids)


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[int, str]:
    """Token ids of `text` with what each decodes to. One entry means: exactly this text is one token.

    `convert_tokens_to_ids` would give None or the unknown token for a text that is not in the vocabulary; an
    encoding that does not decode to the text again is shown as such instead.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = {i: tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids}
    if len(ids) == 1 and shown[ids[0]] != text:
        return {ids[0]: shown[ids[0]], -1: "(not the same text)"}
    return shown if len(shown) == len(ids) else {**shown, -1: "(repeated)"}


def _show(pieces: dict[int, str]) -> str:
    return " + ".join(repr(p) if i >= 0 else p for i, p in pieces.items()) or "nothing"


def end_think_ids(tokenizer: PreTrainedTokenizerBase, end_think: str | Sequence[int] | None) -> Sequence[int] | None:
    """The ids of the end-of-thinking mark: one vocabulary entry if it is text, else what was given."""
    if not isinstance(end_think, str):
        return end_think
    pieces = _pieces(tokenizer, end_think)
    if len(pieces) != 1:
        raise InputError(
            f"end_think={end_think!r} is not in this vocabulary (it would be {_show(pieces)}); give the mark of your "
            "model, its token ids (end_think=12,34), or end_think=none to a logits rule if the model does not think"
        )
    return list(pieces)


# --- where the prompt ends -------------------------------------------------------------------------------------


class PromptLength:
    """How many of a call's columns are the prompt: P.

    The decode loop says so with `begin`. Under plain `generate` nobody does, so a call continues the generation of the
    call before if all but its newest column are known from there (for beams: from any row; for assisted decoding: a
    shorter part of it), and starts a new one otherwise. A new prompt that is a part of the previous output therefore
    counts as its continuation, unless `prompt_length` or `begin` says otherwise.
    """

    def __init__(self, fixed: int | None) -> None:
        if fixed is not None and fixed < 1:
            raise InputError(f"prompt_length={fixed} is not allowed; give the number of prompt columns, >= 1")
        self.length = fixed
        self.fixed = fixed is not None
        self.looped = False  # the decode loop runs: rows come alone and jump to and fro
        self.prompts: Tensor | None = None
        self.last: Tensor | None = None
        self.warned = False

    def begin(self, prompt_length: int) -> None:
        self.length, self.looped = prompt_length, True
        self.fixed = self.warned = False
        self.prompts = self.last = None

    def end(self) -> None:
        self.looped = False
        self.prompts = self.last = None

    def __call__(self, input_ids: Tensor) -> int:
        width = input_ids.shape[1]
        if self.fixed:
            if width < self.length:
                raise InputError(f"prompt_length={self.length} is more than the {width} tokens given; leave it out")
        elif self.looped:
            self._follow_loop(input_ids, width)
        else:
            self._follow_generate(input_ids, width)
        return self.length

    def _follow_loop(self, input_ids: Tensor, width: int) -> None:
        if self.prompts is None and width == self.length:
            self.prompts = input_ids.clone()
        known = self.prompts is not None and width >= self.length
        if not known or not _rows_in(input_ids[:, : self.length], self.prompts):
            self.looped = False  # another generation, outside the loop
            self._follow_generate(input_ids, width)

    def _follow_generate(self, input_ids: Tensor, width: int) -> None:
        known = self.last is not None and self.length < width <= self.last.shape[1] + 1
        before = self.last[:, : width - 1] if known else None
        if not known or not _rows_in(input_ids[:, :-1], before):
            self.length, self.warned = width, False
        elif not self.warned and input_ids.shape[0] == before.shape[0] and not torch.equal(input_ids[:, :-1], before):
            self.warned = True
            warnings.warn(
                "beam search gives log-probabilities; the bias is added to them and they no longer sum to 1. "
                "Set renormalize_logits=True.",
                stacklevel=2,
            )
        self.last = input_ids.clone()


def _rows_in(rows: Tensor, table: Tensor) -> bool:
    """Whether every row of (n, length) is a row of (m, length)."""
    if rows.shape == table.shape and torch.equal(rows, table):
        return True
    return bool((rows[:, None] == table[None]).all(-1).any(1).all())


# --- the processor and the method that subclasses fill in ------------------------------------------------------


class BiasLogitsProcessor(LogitsProcessor):
    """Adds one number per row to the logits of a few tokens, until the row has ended thinking."""

    def __init__(
        self, token_ids: Sequence[int], end_think_ids: Sequence[int] | None, prompt_length: int | None = None
    ) -> None:
        self.token_ids = tuple(dict.fromkeys(checked_ids("token_ids", token_ids)))  # each biased once
        self.end_think_ids = None if end_think_ids is None else checked_ids("end_think_ids", end_think_ids)
        self.prompt_length = PromptLength(prompt_length)

    def begin(self, prompt_length: int) -> None:
        """A new generation starts; its prompts fill the first `prompt_length` columns."""
        self.prompt_length.begin(prompt_length)

    def end(self) -> None:
        """The generation that `begin` announced is over."""
        self.prompt_length.end()

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
        generated = input_ids[:, self.prompt_length(input_ids) :]
        bias = self.bias(generated).masked_fill(self._ended(generated), 0.0)
        if not bool(bias.any()):
            return scores
        ids = torch.tensor(self.token_ids, device=scores.device)
        return scores.float().index_add(1, ids, bias[:, None].expand(-1, len(ids)))

    def _ended(self, generated: Tensor) -> Tensor:
        """Rows (batch,) whose generated ids hold the whole end mark. In a prompt it does not count."""
        if self.end_think_ids is None or generated.shape[1] < len(self.end_think_ids):
            return torch.zeros(generated.shape[0], dtype=torch.bool, device=generated.device)
        mark = torch.tensor(self.end_think_ids, device=generated.device)
        return (generated.unfold(1, len(mark), 1) == mark).all(-1).any(-1)


def read_ids(value: Any) -> Any:
    """Ids from the command line: '12,34'. Other values pass."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\s*,\s*\d+)*\s*", value):
        return tuple(int(part) for part in value.split(","))
    return read_none(value)


def read_none(value: Any) -> Any:
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


TokenIds = Annotated[tuple[TokenId, ...] | None, BeforeValidator(read_ids)]
EndThink = Annotated[str | tuple[TokenId, ...] | None, BeforeValidator(read_ids)]


class ReflectionMethod(LoopMethod):
    """What the wave and TIP share: whose logits they change, until when, and how they act as a logits processor.

    With `tokenizer=` (or `token_ids=` and `end_think` given as ids or None) the method itself is a logits processor:
    `model.generate(**inputs, logits_processor=[CyclicReflex(tokenizer=tokenizer)])`.
    """

    words: Lines = Field(REFLECTION_WORDS, description="reflection words, one token each; or a file with one a line")
    leading_space: bool = Field(True, description="also the form of each word that follows a space")
    token_ids: TokenIds = Field(None, description="token ids instead of words")
    end_think: EndThink = Field(
        "</think>", description="mark after which a row is left alone: text, ids, or none for models without one"
    )

    _tokenizer: PreTrainedTokenizerBase | None = PrivateAttr(None)
    _processor: BiasLogitsProcessor | None = PrivateAttr(None)

    def __init__(self, *, tokenizer: PreTrainedTokenizerBase | None = None, **values: Any) -> None:
        super().__init__(**values)
        self._tokenizer = tokenizer
        if tokenizer is not None:
            self._processor = self.processor(tokenizer)

    @model_validator(mode="after")
    def _has_tokens(self) -> ReflectionMethod:
        if self.token_ids is None:
            check_words(self.words)
        else:
            checked_ids("token_ids", self.token_ids)
        if isinstance(self.end_think, tuple):
            checked_ids("end_think", self.end_think)
        return self

    def processor(self, tokenizer: PreTrainedTokenizerBase | None) -> BiasLogitsProcessor:
        """A new logits processor with these parameters."""
        if tokenizer is None and (self.token_ids is None or isinstance(self.end_think, str)):
            raise InputError(
                f"{self.slug} as a logits processor must look up its words and end_think={self.end_think!r}; "
                f"write {type(self).__name__}(tokenizer=tokenizer), or give token_ids and end_think as ids or None"
            )
        ids = self.token_ids
        if ids is None:
            ids = reflection_token_ids(tokenizer, self.words, self.leading_space)
        return self._build(ids, end_think_ids(tokenizer, self.end_think))

    def plugins(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Plugins:
        return Plugins(processors=[self.processor(tokenizer)])

    def begin(self, prompt_length: int) -> None:
        """A new generation starts (the decode loop says so); see `BiasLogitsProcessor.begin`."""
        self._running().begin(prompt_length)

    def end(self) -> None:
        """The generation that `begin` announced is over."""
        self._running().end()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Act as a logits processor."""
        return self._running()(input_ids, scores)

    def __copy__(self) -> ReflectionMethod:
        copied = super().__copy__()
        copied._processor = None  # `model_copy(update=...)` must not run on with the old parameters
        return copied

    def _running(self) -> BiasLogitsProcessor:
        if self._processor is None:
            self._processor = self.processor(self._tokenizer)
        return self._processor

    def _build(self, token_ids: Sequence[int], end_think_ids: Sequence[int] | None) -> BiasLogitsProcessor:
        raise NotImplementedError


# --- refusals --------------------------------------------------------------------------------------------------


def require(holds: Any, name: str, value: Any, allowed: str) -> None:
    """Refuse unless `holds` (a bool, array or tensor) and the value is finite."""
    if isinstance(value, Tensor):
        good = bool((holds & torch.isfinite(value)).all())
    else:
        good = bool(np.all(holds) and np.all(np.isfinite(value)))
    if not good:
        raise InputError(f"{name}={value} is not allowed; give {allowed}")


def check_words(words: Sequence[str]) -> None:
    if not words or any(not word.strip() for word in words):
        raise InputError(f"the reflection words {list(words)} are empty or hold an empty one; give at least one word")


def checked_ids(name: str, ids: Sequence[int]) -> tuple[int, ...]:
    """The ids in order, as a tuple; refused if there are none or one is negative."""
    if not ids:
        raise InputError(f"{name} is empty; give at least one token id")
    if any(i < 0 for i in ids):
        raise InputError(f"{name} has {min(ids)}; give token ids >= 0")
    return tuple(ids)
