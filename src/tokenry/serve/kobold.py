"""KoboldCpp's own routes, for clients that know no others; they ask the same service as OpenAI's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from .answers import EVENTS, Answers, Finish, Text, usage
from .backend import Backend, Piece
from .errors import ERRORS
from .protocol import KoboldRequest
from .service import Service

__all__ = ["add_kobold"]

API = "1.2.5"  # the version of KoboldAI's routes that KoboldCpp names
SPOKEN = "1.76"  # the version of KoboldCpp whose requests are understood: the first that bans texts


class KoboldText(BaseModel):
    """One text."""

    text: str
    finish_reason: Finish | None = Field(...)
    logprobs: None = Field(...)
    prompt_tokens: int
    completion_tokens: int


class KoboldTexts(BaseModel):
    """The text that continues a prompt."""

    results: list[KoboldText]


class Written(BaseModel):
    """What there is of a text."""

    text: str


class WrittenTexts(BaseModel):
    """The text that is being written; empty where there is none."""

    results: list[Written]


class Name(BaseModel):
    """The model of this server, or the version of its routes."""

    result: str


class Version(BaseModel):
    """What clients look at to know which fields they may send."""

    result: Literal["KoboldCpp"] = "KoboldCpp"
    version: str = SPOKEN


class Window(BaseModel):
    """The most tokens of prompt and text together; null: not known."""

    value: int | None


class Uncounted(BaseModel):
    """A text whose tokens are to be counted."""

    model_config = ConfigDict(strict=True)

    prompt: str
    special: bool = Field(default=True, description="with those that a prompt gets, such as one that begins it")


class TokenCount(BaseModel):
    """The tokens of a text."""

    value: int
    ids: list[int]


class Whose(BaseModel):
    """Whose texts are meant."""

    model_config = ConfigDict(strict=True)

    genkey: str = Field(default="", description="that of the requests; without one: those that have none")


class Aborted(BaseModel):
    """Whether there was such a text."""

    success: Literal["true", "false"]


class KoboldAnswers(Answers):
    """The shape of /api/v1/generate."""

    mark, done = "event: message\n", ""

    def whole(self, texts: Sequence[Text]) -> KoboldTexts:
        counted = [usage([text]) for text in texts]
        results = [
            KoboldText(
                text=text.text,
                finish_reason=text.ending()["finish_reason"],
                logprobs=None,
                prompt_tokens=count.prompt_tokens,
                completion_tokens=count.completion_tokens,
            )
            for text, count in zip(texts, counted)
        ]
        return KoboldTexts(results=results)

    def chunk(self, text: Text, part: Piece) -> dict[str, Any]:
        return {"token": part.text, "finish_reason": text.ending()["finish_reason"]}


def add_kobold(app: FastAPI, service: Service, secured: list[Any]) -> None:
    """Add the routes."""
    _add_texts(app, service, secured)
    _add_questions(app, service.backend, secured)
    _add_count(app, service, secured)


def _add_texts(app: FastAPI, service: Service, secured: list[Any]) -> None:
    @app.post(
        "/api/v1/generate", response_model=KoboldTexts, responses=ERRORS, dependencies=secured, tags=["koboldcpp"]
    )
    async def generate(asked: KoboldRequest, http: Request) -> Response:
        """Continue a prompt."""
        return await service.continue_one(http, asked, KoboldAnswers, stream=False)

    @app.post(
        "/api/extra/generate/stream",
        response_model=None,
        responses={200: {"content": EVENTS}, **ERRORS},
        dependencies=secured,
        tags=["koboldcpp"],
    )
    async def generate_stream(asked: KoboldRequest, http: Request) -> Response:
        """Continue a prompt, in pieces."""
        return await service.continue_one(http, asked, KoboldAnswers, stream=True)

    @app.post("/api/extra/abort", responses=ERRORS, dependencies=secured, tags=["koboldcpp"])
    async def abort(whose: Whose | None = None) -> Aborted:
        """End texts as they are."""
        return Aborted(success="true" if service.abort(whose.genkey if whose else "") else "false")

    @app.post("/api/extra/generate/check", responses=ERRORS, dependencies=secured, tags=["koboldcpp"])
    async def check(whose: Whose | None = None) -> WrittenTexts:
        """What there is of the newest text that is being written."""
        return WrittenTexts(results=[Written(text=service.written(whose.genkey if whose else ""))])

    @app.get("/api/extra/generate/check", responses=ERRORS, dependencies=secured, tags=["koboldcpp"])
    async def check_without_key() -> WrittenTexts:
        """The same of requests that have no key."""
        return await check()


def _add_count(app: FastAPI, service: Service, secured: list[Any]) -> None:
    @app.post("/api/extra/tokencount", responses=ERRORS, dependencies=secured, tags=["koboldcpp"])
    async def count_tokens(asked: Uncounted) -> TokenCount:
        """How many tokens a text has: by that, clients choose what of a chat they send."""
        ids = await service.ids(asked.prompt, asked.special)
        return TokenCount(value=len(ids), ids=ids)


def _add_questions(app: FastAPI, backend: Backend, secured: list[Any]) -> None:
    @app.get("/api/v1/model", responses=ERRORS, dependencies=secured, tags=["koboldcpp"])
    async def kobold_model() -> Name:
        """The model."""
        return Name(result=f"koboldcpp/{backend.name}")

    @app.get("/api/v1/info/version", responses=ERRORS, dependencies=secured, tags=["koboldcpp"])
    async def api_version() -> Name:
        """The version of KoboldAI's routes."""
        return Name(result=API)

    @app.get("/api/extra/version", responses=ERRORS, dependencies=secured, tags=["koboldcpp"])
    async def version() -> Version:
        """The version of KoboldCpp whose requests are understood."""
        return Version()

    @app.get("/api/extra/true_max_context_length", responses=ERRORS, dependencies=secured, tags=["koboldcpp"])
    @app.get("/api/v1/config/max_context_length", responses=ERRORS, dependencies=secured, tags=["koboldcpp"])
    async def max_context_length() -> Window:
        """The window of the model."""
        return Window(value=backend.window)
