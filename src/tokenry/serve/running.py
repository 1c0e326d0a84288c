"""Listen at an address until told to stop; then finish what runs."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from ..core.errors import InputError
from .app import close

__all__ = ["Server", "bound"]

DRAIN = 5  # seconds for clients to read what was written


class Server(uvicorn.Server):
    """Closes the backend before the connections, so that every stream says how it has ended.

    Args:
        grace: seconds in which running texts may end.
        ready: called when it listens.
    """

    def __init__(self, app: FastAPI, grace: float, ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=DRAIN, ws="none")
        )
        self.app, self.grace, self.ready = app, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await close(self.app, self.grace)
        await super().shutdown(sockets)


def bound(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is any free one.

    Raises:
        InputError: it cannot be had.
    """
    place = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except OSError as error:
        place.close()
        reason = error.strerror or error
        raise InputError(f"{host}:{port} cannot be listened at ({reason}); give another --port or --host") from None
    return place
