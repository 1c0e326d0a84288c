"""What every request passes first: whose it is, whether the server is closing; and what was answered is counted."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..core.fields import shown
from .errors import refusal
from .metrics import Metrics

__all__ = ["Gate", "State"]

OPEN = ("/health",)  # a load balancer has no key


@dataclass
class State:
    """Whether the server is closing, and takes nothing new."""

    closing: bool = False


class Gate:
    """An ASGI middleware.

    Args:
        routes: the paths that are told apart when requests are counted.
        most: bytes of a body.
        api_key: what requests must bring as bearer token; None: nothing.
        hosts: the names by which the server may be asked; None: any. Where no key is needed this keeps out web pages
            whose own name was pointed at this machine.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        state: State,
        routes: Collection[str],
        most: int,
        api_key: str | None = None,
        hosts: Collection[str] | None = None,
    ) -> None:
        self.app, self.metrics, self.state, self.routes = app, metrics, state, frozenset(routes)
        self.most = most
        self.api_key, self.hosts = None if api_key is None else api_key.encode(), hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 500  # unless an answer begins

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        read = 0

        async def bounded() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise HTTPException(413)
            return message

        try:
            await (self._refused(scope) or self.app)(scope, bounded, counted)
        finally:
            route = scope["path"] if scope["path"] in self.routes else "other"
            self.metrics.requests.labels(route, str(status)).inc()

    def _refused(self, scope: Scope) -> Response | None:
        """The answer to a request that does not come in."""
        headers = Headers(scope=scope)
        name = _name(headers.get("host", ""))
        if self.hosts is not None and name not in self.hosts:
            allowed = ", ".join(self.hosts)
            return refusal(f"this server is not called {shown(name)}; ask it as one of {allowed}", 403)
        if scope["path"] not in OPEN and not self._has_key(headers.get("authorization", "")):
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            return refusal(message, 401, headers={"WWW-Authenticate": "Bearer"})
        size = headers.get("content-length", "")
        if size.isdecimal() and int(size[:20]) > self.most:
            return refusal(f"the body has {size[:20]} bytes; send at most {self.most}", 413)
        if self.state.closing:
            return refusal("the server is closing; ask again when it is back", 503, headers={"Retry-After": "10"})
        return None

    def _has_key(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        right = self.api_key is None or hmac.compare_digest(key.strip().encode("latin-1"), self.api_key)
        return right and (self.api_key is None or scheme.lower() == "bearer")


def _name(host: str) -> str:
    """The name in a Host header, without the port."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0].lower()
