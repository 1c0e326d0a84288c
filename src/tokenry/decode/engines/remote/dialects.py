"""How servers are asked for the next tokens, and how they tell which ones they wrote.

All take `POST /v1/completions`. They differ in whether they take and tell token ids, and in what they call things:

* vLLM tells ids with `return_token_ids`, and marks the likeliest tokens as "token_id:N";
* llama-server tells ids with `return_tokens`, at `/completion` alone; what it tells beside log-probabilities lacks the
  tokens that end in the middle of a character;
* others tell text alone. Then the prompt is sent as text as well, and what comes back is tokenized here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, cast

from transformers import PreTrainedTokenizerBase
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ....core.errors import InputError
from ....core.fields import shown
from ....text.token_text import REPLACEMENT

__all__ = ["TOP", "VLLM", "Continuation", "Dialect", "LlamaServer", "Request", "Sampling", "TextOnly"]

TOP = 20  # the most log-probabilities that servers tell of a position
OPENAI = "v1/completions"
BAN = -100.0  # the lowest bias that servers take
NOT_OF_OPENAI = ("top_k", "min_p", "repetition_penalty")  # what not every server knows
ANCHOR = "\n"  # before a text that goes on, so that tokenizers do not take it for a beginning

Likeliest = Mapping[int, float]  # {token: log-probability}


@dataclass(frozen=True)
class Sampling:
    """How the server draws tokens; temperature 0 takes the most probable one. The penalty changes scores before."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def relaxed(self, level: int) -> Sampling:
        """Without the first ones of temperature, min-p, top-p and top-k."""
        neutral = {"temperature": float(not self.greedy), "min_p": 0.0, "top_p": 1.0, "top_k": 0}
        return replace(self, **{name: neutral[name] for name in list(neutral)[:level]})

    def warpers(self) -> list[LogitsProcessor]:
        """The same for scores that are here."""
        if self.greedy:
            return []
        made: list[LogitsProcessor] = [TemperatureLogitsWarper(self.temperature)] if self.temperature != 1 else []
        made += [TopKLogitsWarper(self.top_k)] if self.top_k else []
        made += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []
        return made + ([MinPLogitsWarper(self.min_p)] if self.min_p else [])


@dataclass(frozen=True)
class Request:
    """Ask for `count` tokens behind a prompt and what was written since.

    Attributes:
        bias: {token: what is added to its score}; -inf bans it.
        top: how many of the likeliest tokens are to be told at each position.
    """

    prompt: Sequence[int]
    written: Sequence[int]
    count: int
    sampling: Sampling = Sampling()
    bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    top: int = 0

    def common(self) -> dict[str, Any]:
        """The fields that all servers understand."""
        body: dict[str, Any] = {"max_tokens": self.count, "temperature": self.sampling.temperature}
        body["top_p"] = self.sampling.top_p
        if self.bias:
            body["logit_bias"] = {str(token): _bounded(value) for token, value in self.bias.items()}
        if self.seed is not None and not self.sampling.greedy:
            body["seed"] = self.seed
        return body


@dataclass(frozen=True)
class Continuation:
    """What a server wrote.

    Attributes:
        tops: the likeliest tokens at the place of each token, and that token itself; empty where that is not told.
        ended: whether the text ended, by a token or because there is no more room.
        by_token: whether a token ended it.
        lost: whether tokens are missing behind these, so that the rest of the stream is of no use.
    """

    ids: list[int]
    tops: Sequence[Likeliest]
    ended: bool
    by_token: bool
    lost: bool = False


class Dialect(Protocol):
    """How one kind of server is spoken to.

    Attributes:
        name: as the user gives it.
        path: where it listens.
        tells: whether it tells ids, and with them the likeliest tokens.
    """

    name: ClassVar[str]
    path: ClassVar[str]
    tells: ClassVar[bool]

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON of a request."""
        ...

    def read(self, answer: Mapping[str, Any], request: Request) -> Continuation:
        """What the server wrote; whatever is missing in the answer raises as it does in Python."""
        ...


class VLLM:
    """vLLM, and tokenry's own server."""

    name: ClassVar[str] = "vllm"
    path: ClassVar[str] = OPENAI
    tells: ClassVar[bool] = True

    def body(self, request: Request) -> dict[str, Any]:
        sampling, neutral = request.sampling, {"presence_penalty": 0.0, "frequency_penalty": 0.0}
        chosen = {name: getattr(sampling, name) for name in NOT_OF_OPENAI}
        told: dict[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True}
        told |= {"logprobs": request.top} if request.top else {}
        return {"prompt": [*request.prompt, *request.written], **request.common(), **chosen, **neutral, **told}

    def read(self, answer: Mapping[str, Any], request: Request) -> Continuation:
        choice = answer["choices"][0]
        ids = _checked(choice["token_ids"], request)
        told = choice.get("logprobs") or {}
        tops = [_marked(likeliest) for likeliest in told.get("top_logprobs") or [{}] * len(ids)]
        if any(tops):
            taken = told["token_logprobs"]
            tops = [{**top, token: float(value)} for token, top, value in zip(ids, tops, taken, strict=True)]
        return Continuation(ids, tops, *_ended(choice))

    def part(self, event: Mapping[str, Any], request: Request, count: int) -> Continuation:
        """What an event of a stream adds to the `count` tokens before."""
        choice = event["choices"][0] if event["choices"] else {}  # the last event may count alone
        return self.read({"choices": [{**choice, "token_ids": choice.get("token_ids") or []}]}, request)


class LlamaServer:
    """The server of llama.cpp. Its streams leave out the tokens that end in the middle of a character."""

    name: ClassVar[str] = "llama.cpp"
    path: ClassVar[str] = "completion"
    tells: ClassVar[bool] = True

    def body(self, request: Request) -> dict[str, Any]:
        sampling = request.sampling
        body = {"prompt": [*request.prompt, *request.written], **request.common()}
        body |= {"top_k": sampling.top_k, "min_p": sampling.min_p, "return_tokens": True, "n_probs": request.top}
        body |= {"repeat_penalty": sampling.repetition_penalty, "repeat_last_n": len(body["prompt"]) + request.count}
        body["samplers"] = ["penalties", "temperature", "top_k", "top_p", "min_p"]  # in the order of transformers
        if request.bias:
            body["logit_bias"] = [[t, False if v == -math.inf else _bounded(v)] for t, v in request.bias.items()]
        return body

    def read(self, answer: Mapping[str, Any], request: Request) -> Continuation:
        ids = _checked(answer["tokens"], request)
        told = [
            (entry["id"], {top["id"]: float(top["logprob"]) for top in [*entry["top_logprobs"], entry]})
            for entry in answer.get("completion_probabilities") or []
        ]
        by_token = answer["stop_type"] in ("eos", "word")
        return Continuation(ids, _placed(ids, told), by_token or bool(answer.get("truncated")), by_token)

    def part(self, event: Mapping[str, Any], request: Request, count: int) -> Continuation:
        """As `VLLM.part`."""
        if event["tokens_predicted"] != count + len(event["tokens"]):
            return Continuation([], [], False, False, lost=True)
        return self.read({"stop_type": "none", **event}, request)

    def wrote(self, choice: Mapping[str, Any]) -> bool:
        """Whether a choice of `/v1/completions` is this server's, when log-probabilities were asked for."""
        content = (choice.get("logprobs") or {}).get("content")
        return bool(content) and "id" in content[0]


class TextOnly:
    """A server that tells text alone."""

    name: ClassVar[str] = "text"
    path: ClassVar[str] = OPENAI
    tells: ClassVar[bool] = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def body(self, request: Request) -> dict[str, Any]:
        sampling, ids = request.sampling, [*request.prompt, *request.written]
        if ids[0] == self.tokenizer.bos_token_id:
            del ids[0]  # the server puts it there itself
        chosen = {name: getattr(sampling, name) for name in NOT_OF_OPENAI}
        return {
            "prompt": self._decoded(ids, skip_special_tokens=False).rstrip(REPLACEMENT),
            **request.common(),
            **{name: value for name, value in chosen.items() if value != getattr(Sampling, name)},
        }

    def read(self, answer: Mapping[str, Any], request: Request) -> Continuation:
        choice = answer["choices"][0]
        ids = self.continued(choice["text"].rstrip(REPLACEMENT))
        return Continuation(ids, [{} for _ in ids], *_ended(choice))

    def continued(self, text: str) -> list[int]:
        """The tokens of a text that goes on from another one."""
        before, both = (self.tokenizer.encode(t, add_special_tokens=False) for t in (ANCHOR, ANCHOR + text))
        ids = both[len(before) :] if both[: len(before)] == before else None
        if ids is None or self._decoded([*before, *ids]) != ANCHOR + text:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _decoded(self, ids: Sequence[int], **options: Any) -> str:
        return cast(str, self.tokenizer.decode([*ids], clean_up_tokenization_spaces=False, **options))


def _bounded(value: float) -> float:
    return min(max(value, BAN), -BAN)


def _marked(likeliest: Mapping[str, float]) -> dict[int, float]:
    """The tokens that are named by their ids."""
    mark = "token_id:"
    return {int(name[len(mark) :]): float(value) for name, value in likeliest.items() if name.startswith(mark)}


def _placed(ids: list[int], told: Sequence[tuple[int, Likeliest]]) -> list[Likeliest]:
    """What was told in the order of the tokens, but not for each of them, at its place; nothing where that is not
    certain."""
    first, last = (_matched(i, t) for i, t in ((ids, told), (ids[::-1], told[::-1])))
    last = [len(ids) - 1 - place for place in reversed(last)]
    tops: list[Likeliest] = [{} for _ in ids]
    for early, late, (_, likeliest) in zip(first, last, told):
        if early == late:
            tops[early] = likeliest
    return tops


def _matched(ids: list[int], told: Sequence[tuple[int, Likeliest]]) -> list[int]:
    """The earliest places that the tokens told can have."""
    places: list[int] = []
    for token, _ in told:
        places.append(ids.index(token, places[-1] + 1 if places else 0))
    return places


def _checked(ids: Any, request: Request) -> list[int]:
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise InputError(f"the server told tokens that are none, {shown(ids)}; use one that tells token ids")
    return ids[: request.count]


def _ended(choice: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the text ended, and whether by a token."""
    ended = choice.get("finish_reason") not in (None, "length")
    return ended, ended
