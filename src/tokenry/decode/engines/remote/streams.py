"""An answer while the server writes it: server-sent events, and who takes them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ....core.errors import InputError
from ....core.files import parse_json
from .dialects import VLLM, Continuation, LlamaServer, Request

if TYPE_CHECKING:
    import httpx

__all__ = ["EVENTS", "Stream", "Teller", "events_of", "message_of", "read_events"]

EVENTS = "text/event-stream"

Teller = VLLM | LlamaServer  # the dialects that tell tokens


class Stream:
    """What a server writes to one request, for the one thread that takes it.

    Args:
        run: runs something in the thread of the requests.
        parts: what comes, as it comes.
    """

    def __init__(self, run: Callable[[Any], Future[Any]], parts: AsyncGenerator[Continuation, None]) -> None:
        self.run, self.parts = run, parts

    def next(self) -> Future[Continuation | None]:
        """What has come since; None at the end. To cancel the future closes the connection."""
        return self.run(self._next())

    async def _next(self) -> Continuation | None:
        return await anext(self.parts, None)

    def close(self) -> None:
        """Close the connection, by which the server knows that nobody reads on. No `next` may be under way."""
        with suppress(InputError):  # all connections are closed already
            self.run(self.parts.aclose())


async def events_of(response: httpx.Response) -> AsyncIterator[list[bytes]]:
    """The data of server-sent events, those together that came together."""
    rest = b""
    async for data in response.aiter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        said = [line.removeprefix(b"data:").strip() for line in lines if line.startswith(b"data:")]
        yield [data for data in said if data != b"[DONE]"]


def message_of(said: Any) -> str:
    """What a server says of an error, on one line."""
    if isinstance(said, dict):
        said = next((said[name] for name in ("error", "detail", "message") if said.get(name)), said)
    if isinstance(said, dict):
        said = said.get("message", said)
    return " ".join(str(said).split())[:300]


def read_events(dialect: Teller, events: Sequence[bytes], request: Request, count: int) -> Continuation:
    """What these events of a stream add to the `count` tokens before.

    Raises:
        InputError: the server says in one of them what went wrong.
    """
    came = Continuation([], [], False, False)
    for data in events:
        event = parse_json(data.decode())
        if event.get("error"):
            raise InputError(f"the server broke off: {message_of(event)}")
        part = dialect.part(event, request, count + len(came.ids))
        came = Continuation(
            came.ids + part.ids,
            [*came.tops, *part.tops],
            came.ended or part.ended,
            came.by_token or part.by_token,
            part.lost,
        )
        if part.lost:
            break
    return came
