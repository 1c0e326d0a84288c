"""What a client is told: texts as they grow, in the shapes of OpenAI's completions and chats."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerBase

from ..text.token_text import REPLACEMENT
from .backend import Piece, Ranked, Work

__all__ = [
    "EVENTS",
    "Answers",
    "Chat",
    "ChatAnswers",
    "Completion",
    "CompletionAnswers",
    "Finish",
    "Models",
    "Text",
    "usage",
]

Finish = Literal["stop", "length"]
EVENTS: dict[str, Any] = {  # what OpenAPI says of a stream: of each event
    "text/event-stream": {
        "schema": {
            "type": "object",
            "properties": {"event": {"const": "message"}, "data": {"type": "string"}},
            "required": ["data"],
        }
    }
}


class PromptDetails(BaseModel):
    """Of the tokens of the prompts: how many were not read, as others before them begin alike."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None


class _Choice(BaseModel):
    model_config = ConfigDict(extra="forbid")

    index: int
    finish_reason: Finish | None = Field(...)
    stop_reason: Literal["timeout"] | None = Field(default=None, description="what cut the text short besides length")
    token_ids: list[int] | None = None
    events: list[dict[str, Any]] | None = Field(default=None, description="repairs of the text, where there were any")


class TextLogprobs(BaseModel):
    """Log-probabilities of a completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Choice):
    """One text."""

    text: str
    logprobs: TextLogprobs | None = Field(...)
    prompt_token_ids: list[int] | None = None


class Completion(BaseModel):
    """Texts that continue prompts."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(BaseModel):
    """One token; `bytes` is null for a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None = Field(...)


class RankedToken(TokenLogprob):
    """One token and the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat's turn."""

    content: list[RankedToken]


class Turn(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str


class ChatChoice(_Choice):
    """One turn."""

    message: Turn
    logprobs: ChatLogprobs | None = Field(...)


class Chat(BaseModel):
    """Turns that continue a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class Model(BaseModel):
    """The model of this server."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tokenry"
    max_model_len: int | None = None


class Models(BaseModel):
    """All models of this server."""

    object: Literal["list"] = "list"
    data: list[Model]


class Text:
    """A text as it grows."""

    def __init__(self, index: int, work: Work) -> None:
        self.index, self.work = index, work
        self.text = ""
        self.ids: list[int] = []
        self.logprobs: list[Ranked] = []
        self.offsets: list[int] = []
        self.last: Piece | None = None

    def add(self, piece: Piece) -> None:
        """Take a piece."""
        self.last = piece if piece.finish else None
        self.text += piece.text
        self.ids += piece.ids
        self.logprobs += piece.logprobs
        self.offsets += piece.offsets

    def whole(self) -> Piece:
        """All of it as one piece."""
        return Piece(self.ids, self.text, self.logprobs, self.offsets)

    def ending(self) -> dict[str, Any]:
        """How it ended, as fields of a choice."""
        if self.last is None:
            return {"finish_reason": None}
        fields: dict[str, Any] = {"finish_reason": "stop" if self.last.finish == "stop" else "length"}
        if self.last.finish == "timeout":
            fields["stop_reason"] = "timeout"
        return fields | ({"events": [dict(event) for event in self.last.events]} if self.last.events else {})


@dataclass
class Answers:
    """Makes the JSON of one request's answers; a subclass knows the shape.

    Attributes:
        plain: name tokens by what they say, not by their ids.
        tell_ids: give the ids of prompt and text.
    """

    model: str
    tokenizer: PreTrainedTokenizerBase
    plain: bool = True
    tell_ids: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def token(self, token: int) -> str:
        """What a token is called."""
        return str(self.tokenizer.decode([token])) if self.plain else f"token_id:{token}"

    def head(self, kind: str) -> dict[str, Any]:
        """The first fields of every answer."""
        return {"id": self.prefix + self.id, "object": kind, "created": self.created, "model": self.model}

    prefix = ""
    mark, done = "", "data: [DONE]\n\n"  # before each event, and at the end of all

    def event(self, value: Mapping[str, Any]) -> str:
        """A chunk as an event of a stream."""
        return f"{self.mark}data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"

    def whole(self, texts: Sequence[Text]) -> BaseModel:
        """The answer in one."""
        raise NotImplementedError

    def opening(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
        """Chunks before the first piece."""
        return []

    def chunk(self, text: Text, part: Piece) -> dict[str, Any]:
        """The chunk of one piece."""
        raise NotImplementedError

    def counted(self, texts: Sequence[Text]) -> dict[str, Any]:
        """The chunk that counts."""
        return {**self.empty(), "usage": usage(texts).model_dump(exclude_unset=True)}

    def empty(self) -> dict[str, Any]:
        """A chunk without choices."""
        raise NotImplementedError


def usage(texts: Sequence[Text]) -> Usage:
    """Tokens read and written; a prompt counts once, however many texts it has."""
    prompts = {id(text.work.prompt_ids): text.work.prompt_ids for text in texts}
    read, written = sum(map(len, prompts.values())), sum(len(text.ids) for text in texts)
    counted = Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)
    reused: dict[int, int] = {}  # what none of the texts of a prompt has read
    for text in texts:
        if text.last is None or text.last.reused is None:
            return counted
        prompt = id(text.work.prompt_ids)
        reused[prompt] = min(text.last.reused, reused.get(prompt, text.last.reused))
    counted.prompt_tokens_details = PromptDetails(cached_tokens=sum(reused.values()))
    return counted


class CompletionAnswers(Answers):
    """The shape of /v1/completions."""

    prefix = "cmpl-"

    def whole(self, texts: Sequence[Text]) -> Completion:
        choices = [CompletionChoice(**self._choice(text, text.whole(), with_prompt=True)) for text in texts]
        return Completion(**self.head("text_completion"), choices=choices, usage=usage(texts))

    def chunk(self, text: Text, part: Piece) -> dict[str, Any]:
        first = len(text.ids) == len(part.ids)
        return {**self.head("text_completion"), "choices": [self._choice(text, part, with_prompt=first)]}

    def empty(self) -> dict[str, Any]:
        return {**self.head("text_completion"), "choices": []}

    def _choice(self, text: Text, part: Piece, with_prompt: bool) -> dict[str, Any]:
        fields = {"index": text.index, "text": part.text, "logprobs": self._logprobs(text, part), **text.ending()}
        if self.tell_ids:
            fields["token_ids"] = list(part.ids)
            fields |= {"prompt_token_ids": list(text.work.prompt_ids)} if with_prompt else {}
        return fields

    def _logprobs(self, text: Text, part: Piece) -> dict[str, Any] | None:
        if text.work.logprobs is None or not part.logprobs:
            return None
        return {
            "tokens": [self.token(one.token) for one in part.logprobs],
            "token_logprobs": [one.logprob for one in part.logprobs],
            "top_logprobs": [self._top(one.top) for one in part.logprobs],
            "text_offset": list(part.offsets),
        }

    def _top(self, top: Mapping[int, float]) -> dict[str, float]:
        """By name. Of tokens that are parts of characters, and so have one name, the likeliest counts."""
        named: dict[str, float] = {}
        for token, logprob in top.items():
            name = self.token(token)
            named[name] = max(logprob, named.get(name, logprob))
        return named


class ChatAnswers(Answers):
    """The shape of /v1/chat/completions."""

    prefix = "chatcmpl-"

    def whole(self, texts: Sequence[Text]) -> Chat:
        choices = []
        for text in texts:
            fields = self._fields(text, text.whole())
            choices.append(ChatChoice(message=Turn(role="assistant", content=text.text), **fields))
        answer = Chat(**self.head("chat.completion"), choices=choices, usage=usage(texts))
        return answer.model_copy(update=self._prompt(texts))

    def opening(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
        head = self.head("chat.completion.chunk")
        delta = {"role": "assistant", "content": ""}
        choices = [{"index": text.index, "delta": delta, "logprobs": None, "finish_reason": None} for text in texts]
        return [{**head, "choices": [choice], **self._prompt(texts)} for choice in choices]

    def chunk(self, text: Text, part: Piece) -> dict[str, Any]:
        delta = {"content": part.text} if part.text or text.last is None else {}
        choice = {**self._fields(text, part), "delta": delta}
        return {**self.head("chat.completion.chunk"), "choices": [choice]}

    def empty(self) -> dict[str, Any]:
        return {**self.head("chat.completion.chunk"), "choices": []}

    def _prompt(self, texts: Sequence[Text]) -> dict[str, Any]:
        return {"prompt_token_ids": list(texts[0].work.prompt_ids)} if self.tell_ids else {}

    def _fields(self, text: Text, part: Piece) -> dict[str, Any]:
        fields: dict[str, Any] = {"index": text.index, "logprobs": None, **text.ending()}
        if text.work.logprobs is not None and part.logprobs:
            content = [
                {
                    **self._named(one.token, one.logprob),
                    "top_logprobs": [self._named(*pair) for pair in one.top.items()],
                }
                for one in part.logprobs
            ]
            fields["logprobs"] = {"content": content}
        return fields | ({"token_ids": list(part.ids)} if self.tell_ids else {})

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        said = str(self.tokenizer.decode([token]))
        data = None if REPLACEMENT in said else list(said.encode())
        return {"token": self.token(token), "logprob": logprob, "bytes": data}
