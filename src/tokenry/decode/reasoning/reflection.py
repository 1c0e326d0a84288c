"""What methods for reasoning models share: reflection words and end marks as token ids, and how words are biased."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, cast

from pydantic import BeforeValidator, Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.fields import TokenId, read_ids
from ...core.method import Lines
from ...text.words import listed
from ..contract import LogitsMethod, Plugins
from .bias import BiasLogitsProcessor, checked_ids

__all__ = ["REFLECTION_WORDS", "ReflectionMethod", "end_think_ids", "reflection_token_ids"]

REFLECTION_WORDS = ("wait", "Wait", "but", "But", "Alternatively")

TokenIds = Annotated[tuple[TokenId, ...] | None, BeforeValidator(read_ids)]
EndThink = Annotated[str | tuple[TokenId, ...] | None, BeforeValidator(read_ids)]


class ReflectionMethod(LogitsMethod):
    """What the wave and TIP share: whose logits they change, and until when.

    In plain `generate` they are a logits processor, a new one for every generation:
    `model.generate(**inputs, logits_processor=[CyclicReflex().processor(tokenizer)])`.
    """

    words: Lines = Field(
        default=REFLECTION_WORDS, description="reflection words, one token each; or a file with one a line"
    )
    leading_space: bool = Field(default=True, description="also the form of each word that follows a space")
    token_ids: TokenIds = Field(default=None, description="token ids instead of words")
    end_think: EndThink = Field(
        default="</think>",
        description="mark after which a row is left alone: text, ids, or none for models without one",
    )

    @model_validator(mode="after")
    def _has_tokens(self) -> ReflectionMethod:
        if self.token_ids is None:
            check_words(self.words)
        else:
            checked_ids("token_ids", self.token_ids)
        if isinstance(self.end_think, tuple):
            checked_ids("end_think", self.end_think)
        return self

    def processor(
        self, tokenizer: PreTrainedTokenizerBase | None = None, prompt_length: int | None = None
    ) -> BiasLogitsProcessor:
        """A new logits processor; a tokenizer is not needed where words and end mark are given as ids."""
        if tokenizer is None and (self.token_ids is None or isinstance(self.end_think, str)):
            raise InputError(
                f"{self.slug} as a logits processor must look up its words and end_think={self.end_think!r}; "
                f"write {type(self).__name__}(...).processor(tokenizer), or give token_ids and end_think as ids or None"
            )
        reader = cast(PreTrainedTokenizerBase, tokenizer)  # there is one where something is looked up
        ids = self.token_ids
        if ids is None:
            ids = reflection_token_ids(reader, self.words, self.leading_space)
        return self._build(ids, end_think_ids(reader, self.end_think), prompt_length)

    def plugins(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Plugins:
        return Plugins(processors=[self.processor(tokenizer)])

    def _build(
        self, token_ids: Sequence[int], end_think_ids: Sequence[int] | None, prompt_length: int | None
    ) -> BiasLogitsProcessor:
        raise NotImplementedError


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
    ids: dict[int, str] = {}
    for form in forms:
        pieces = _pieces(tokenizer, form)
        if len(pieces) != 1:
            hint = " or leave out its form after a space (leading_space=False)" if form not in words else ""
            raise InputError(f"{form!r} is not one token here but {_show(pieces)}; choose another word{hint}")
        ids.update(pieces)
    return list(ids)


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


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[int, str]:
    """Token ids of `text` with what each decodes to. One entry means: exactly this text is one token.

    `convert_tokens_to_ids` would give None or the unknown token for a text that is not in the vocabulary; an
    encoding that does not decode to the text again is shown as such instead.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = {i: cast(str, tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids}
    if len(ids) == 1 and shown[ids[0]] != text:
        return {ids[0]: shown[ids[0]], -1: "(not the same text)"}
    return shown if len(shown) == len(ids) else {**shown, -1: "(repeated)"}


def _show(pieces: dict[int, str]) -> str:
    return " + ".join(repr(p) if i >= 0 else p for i, p in pieces.items()) or "nothing"


def check_words(words: Sequence[str]) -> None:
    if not words or any(not word.strip() for word in words):
        raise InputError(f"the reflection words {list(words)} are empty or hold an empty one; give at least one word")
