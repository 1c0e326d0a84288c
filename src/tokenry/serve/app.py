"""The application: OpenAI's and KoboldCpp's routes, health and metrics, in front of a backend."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Security
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.responses import Response
from starlette.routing import Route

from .. import __version__
from ..decode.contract import DecodeMethod
from .answers import EVENTS, Chat, Completion, Model, Models
from .backend import Backend, Broken
from .errors import ERRORS, Refused, answer_errors
from .gate import Gate, State
from .kobold import add_kobold
from .metrics import Metrics
from .protocol import ChatRequest, CompletionRequest
from .service import LIMITS, Limits, Service

__all__ = ["create_app"]

GRACE = 10.0  # seconds in which running texts may end when the application closes


class Health(BaseModel):
    """That the server is there."""

    status: str = "ok"


def create_app(
    backend: Backend,
    *,
    methods: Sequence[DecodeMethod] = (),
    limits: Limits = LIMITS,
    api_key: str | None = None,
    hosts: Collection[str] | None = None,
    log_texts: bool = False,
) -> FastAPI:
    """The application, for uvicorn or any other ASGI server.

    Args:
        methods: decode methods that act on every request; one that a request names itself goes before.
        api_key: what requests must bring as bearer token; None: nothing.
        hosts: the names by which the server may be asked; None: any.
        log_texts: log prompts and texts; they are logged nowhere else.
    """
    metrics, state = Metrics(backend), State()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await close(app)

    secured = [Security(HTTPBearer(auto_error=False))] if api_key else []
    app = FastAPI(
        title="tokenry",
        version=__version__,
        description="Texts from a language model, with decode methods.",
        docs_url=None,  # these pages fetch scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.backend, app.state.gate = backend, state
    answer_errors(app)
    service = Service(backend, metrics, methods, limits, log_texts)
    _add_texts(app, service, secured)
    add_kobold(app, service, secured)
    _add_models(app, backend, secured)
    _add_watching(app, backend, metrics, secured)
    routes = [route.path for route in app.routes if isinstance(route, Route)]
    app.add_middleware(
        Gate, metrics=metrics, state=state, routes=routes, most=limits.body, api_key=api_key, hosts=hosts
    )
    return app


async def close(app: FastAPI, seconds: float = GRACE) -> None:
    """Take nothing new, and let what runs end within these seconds; a second time does nothing."""
    if not app.state.gate.closing:
        app.state.gate.closing = True
        await app.state.backend.close(seconds)


def _add_texts(app: FastAPI, service: Service, secured: list[Any]) -> None:
    @app.post(
        "/v1/completions",
        response_model=None,
        responses={200: {"model": Completion, "content": EVENTS}, **ERRORS},
        dependencies=secured,
    )
    async def completions(asked: CompletionRequest, http: Request) -> Response:
        """Continue a prompt, or several."""
        return await service.complete(http, asked)

    @app.post(
        "/v1/chat/completions",
        response_model=None,
        responses={200: {"model": Chat, "content": EVENTS}, **ERRORS},
        dependencies=secured,
    )
    async def chat_completions(asked: ChatRequest, http: Request) -> Response:
        """Write the next turn of a conversation."""
        return await service.chat(http, asked)


def _add_models(app: FastAPI, backend: Backend, secured: list[Any]) -> None:
    one = Model(id=backend.name, created=0, max_model_len=backend.window)

    @app.get("/v1/models", responses=ERRORS, dependencies=secured)
    async def models() -> Models:
        """The models there are."""
        return Models(data=[one])

    @app.get("/v1/models/{name:path}", responses=ERRORS, dependencies=secured)
    async def model(name: str) -> Model:
        """One model."""
        if name != backend.name:
            raise Refused(f"there is no model {name[:60]!r}; this server has {backend.name!r}", "model", 404)
        return one


def _add_watching(app: FastAPI, backend: Backend, metrics: Metrics, secured: list[Any]) -> None:
    @app.get("/health", responses=ERRORS)
    async def health() -> Health:
        """Whether the server takes requests, and can write."""
        if backend.broken is not None:
            raise Broken(backend.broken)
        return Health()

    @app.get("/metrics", response_class=PlainTextResponse, responses=ERRORS, dependencies=secured)
    async def counts() -> Response:
        """What was counted, for Prometheus."""
        return Response(metrics.page(), media_type=CONTENT_TYPE_LATEST)
