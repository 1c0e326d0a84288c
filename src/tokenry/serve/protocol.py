"""What a client asks for: the requests of OpenAI's routes, with methods, and with the names other clients send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le, Len
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from ..core.fields import Portion, Probability, TokenId, Tokens, shown
from ..decode.contract import DecodeMethod
from .errors import Refused
from .methods import MethodField, in_force, made
from .names import ALIASES, BY_ELEMENT, RENAMED, canonical, method_entries, unknown

__all__ = ["ChatRequest", "CompletionRequest", "KoboldRequest", "Message", "Sampling"]

COLDEST = 1e-4  # below this temperature only the likeliest token is left
BANNED = -10_000.0  # added to a score; more than any score can make good
MOST_RANKED = 20
NEUTRAL = {"min_p": 0, "typical_p": 1}

Bias = Annotated[float, Ge(-10_000), Le(10_000)]
Texts = Annotated[int, Ge(1), Le(128)]
Given = Annotated[int, Ge(-1), Le(2**62)]  # a seed; -1 is none
Ranks = Annotated[int, Ge(0), Le(MOST_RANKED)]
Penalty = Annotated[float, Ge(0.01), Le(100)]  # scores that are divided by it stay finite
Heat = Annotated[float, Ge(0), Le(10_000)]
Ids = Annotated[list[TokenId], Len(1)]


def _pairs(value: Any) -> Any:
    """The pairs [id, bias] of llama.cpp, where false bans, as an object."""
    if not isinstance(value, list):
        return value
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise ValueError(f"logit_bias={shown(value)} is not allowed; give an object of ids and numbers")
    return {str(token): BANNED if bias is False else bias for token, bias in value}


def _ids(value: Any) -> Any:
    """Ids as numbers with commas between."""
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"custom_token_bans={shown(value)} is not allowed; give ids with commas between, or a list")
    return [int(part) for part in parts]


class StreamOptions(BaseModel):
    """What a stream has besides the text."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool = Field(default=False, description="count tokens in a last chunk")


def _with_aliases(schema: dict[str, Any]) -> None:
    """The other names of options stand in the schema beside them."""
    properties = schema["properties"]
    for alias, name in RENAMED.items():
        if name in properties:
            properties.setdefault(alias, {**properties[name], "description": f"another name of {name}"})
    for name, parts in BY_ELEMENT.items():
        either = [properties[target] for target in parts.values() if target in properties]
        texts = {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 0}]}}
        description = " or ".join(parts.values()) + ", by what the elements are"
        properties[name] = {"anyOf": [texts, *either[1:]], "description": description}


class Sampling(BaseModel):
    """What all requests for a text have in common."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, json_schema_extra=_with_aliases)

    model: str | None = Field(default=None, description="the name that /v1/models says")
    max_tokens: Tokens | None = Field(default=None, description="most new tokens")
    temperature: Heat | None = Field(default=None, description="1 by default; 0: the most probable token")
    top_p: Portion | None = None
    top_k: Annotated[int, Ge(-1), Le(10**6)] | None = Field(default=None, description="0 or -1: no limit")
    min_p: Probability | None = None
    typical_p: Portion | None = None
    repetition_penalty: Penalty | None = Field(default=None, description="of what prompt and text hold; 1: none")
    do_sample: bool | None = Field(default=None, description="false: the most probable token")
    seed: Given | None = Field(default=None, description="-1: none; text i of a request has seed + i")
    stop: Annotated[str | list[str] | None, Field(description="ends the text, which does not have it")] = None
    logit_bias: Annotated[
        dict[str, Bias] | None, BeforeValidator(_pairs, json_schema_input_type=dict[str, Bias] | None)
    ] = Field(default=None, description="{id: what is added to its score}")
    custom_token_bans: Annotated[
        list[TokenId] | None, BeforeValidator(_ids, json_schema_input_type=list[TokenId] | None)
    ] = Field(default=None, description="ids that are never written")
    ignore_eos: bool = Field(default=False, description="go on to max_tokens: no special token is written")
    n: Texts = Field(default=1, description="texts for each prompt")
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = Field(default=False, description="tell the ids of prompt and text")
    return_tokens_as_token_ids: bool = Field(default=False, description="name tokens 'token_id:ID' in logprobs")
    methods: Annotated[list[MethodField], Len(0, 16)] = Field(
        default=[], description="decode methods; one of the server's own with the same name is replaced"
    )

    @model_validator(mode="before")
    @classmethod
    def _understood(cls, values: Any) -> Any:
        return canonical(values) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _without_slips(self) -> Sampling:
        self.ignored()
        return self

    def ignored(self) -> list[str]:
        """The names that were sent and mean nothing here."""
        return unknown(self.model_extra or {}, type(self).model_fields)

    def methods_in_force(self, defaults: Sequence[DecodeMethod]) -> list[DecodeMethod]:
        """The methods of this request on a server that has `defaults`."""
        given = {name: getattr(self, name) for name in ALIASES if getattr(self, name) is not None}
        added = []
        for entry in method_entries(given):
            try:
                added.append(made(entry))
            except Refused as error:
                raise Refused(str(error), next(iter(given))) from None
        return in_force(defaults, self.methods, added)

    def options(self) -> dict[str, Any]:
        """How tokens are drawn, as `model.generate` takes it: OpenAI's defaults, whatever the checkpoint's are."""
        options: dict[str, Any] = {"do_sample": False}
        temperature = 1.0 if self.temperature is None else self.temperature
        if temperature >= COLDEST and self.do_sample is not False:
            options = {"do_sample": True, "temperature": float(temperature), "top_k": max(self.top_k or 0, 0)}
            options["top_p"] = 1.0 if self.top_p is None else float(self.top_p)
            further = {"min_p": self.min_p, "typical_p": self.typical_p}
            options |= {name: float(value) for name, value in further.items() if value not in (None, NEUTRAL[name])}
        if self.repetition_penalty is not None:
            options["repetition_penalty"] = float(self.repetition_penalty)
        return options

    def biases(self, size: int, special: Sequence[int]) -> dict[int, float]:
        """What is added to the scores of tokens, by id.

        Args:
            size: of the vocabulary.
            special: the ids of special tokens.
        """
        bias: dict[int, float] = {}
        for key, value in (self.logit_bias or {}).items():
            if not (key.isascii() and key.isdigit() and int(key[:12]) < size):
                raise Refused(f"logit_bias has the id {shown(key)}; this model has ids 0 to {size - 1}", "logit_bias")
            bias[int(key)] = float(value)
        for token in self.custom_token_bans or ():
            if token >= size:
                raise Refused(
                    f"custom_token_bans has the id {token}; this model has ids 0 to {size - 1}", "custom_token_bans"
                )
        return (
            bias
            | dict.fromkeys(self.custom_token_bans or (), BANNED)
            | (dict.fromkeys(special, BANNED) if self.ignore_eos else {})
        )

    def stops(self) -> list[str]:
        """The texts that end a text."""
        stops = [self.stop] if self.stop and isinstance(self.stop, str) else list(self.stop or ())
        if not all(stops):
            raise Refused("an empty stop string would end every text at once; leave it out", "stop")
        return stops

    def ranked(self) -> int | None:
        """How many of the likeliest tokens are told beside each one; None: no log-probabilities."""
        raise NotImplementedError


def _alias_fields() -> dict[str, Any]:
    """Options of methods at the top of a request, as fields."""
    fields: dict[str, Any] = {}
    for name, alias in ALIASES.items():
        low, high = alias.get("range", (None, None))
        kind: Any = Annotated[float, Ge(low), Le(high)] if alias["type"] == "number" else str | list[str]
        fields[name] = (kind | None, Field(default=None, description=f"{alias['option']} of {alias['method']}"))
    return fields


Asked: type[Sampling] = create_model("Asked", __base__=Sampling, **_alias_fields())
"""`Sampling` with the fields of `names.ALIASES`."""


class CompletionRequest(Asked):  # pyright: ignore[reportGeneralTypeIssues]
    """A prompt, or several, to be continued as they stand."""

    prompt: str | Annotated[list[str], Len(1)] | Ids | Annotated[list[Ids], Len(1)] = Field(
        description="a text, token ids, or a list of either"
    )
    logprobs: Ranks | Literal[False] | None = Field(default=None, description="likeliest tokens told beside each one")

    def prompts(self) -> list[str | list[int]]:
        """One by one."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)

    def ranked(self) -> int | None:
        return None if self.logprobs is False else self.logprobs


class KoboldRequest(Asked):  # pyright: ignore[reportGeneralTypeIssues]
    """A prompt to be continued, as KoboldCpp's own routes take it: whether it streams, the route says."""

    prompt: str
    genkey: str = Field(default="", description="by which the text can be ended")
    logprobs: Literal[False] | None = None
    n: Literal[1] = 1

    def ranked(self) -> None:
        return None


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation; further fields are for the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None

    def turn(self) -> dict[str, Any]:
        """As a chat template reads it."""
        parts = self.content if isinstance(self.content, list) else None
        text = "".join(part.text for part in parts) if parts is not None else self.content or ""
        return {**(self.model_extra or {}), "role": self.role, "content": text}


class ChatRequest(Asked):  # pyright: ignore[reportGeneralTypeIssues]
    """A conversation whose next turn is to be written."""

    messages: Annotated[list[Message], Len(1)]
    logprobs: bool = False
    top_logprobs: Ranks | None = Field(default=None, description="likeliest tokens told beside each one")

    @model_validator(mode="after")
    def _ranks_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise Refused(
                f"top_logprobs={self.top_logprobs} says nothing without logprobs; give logprobs=true", "logprobs"
            )
        return self

    def ranked(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
