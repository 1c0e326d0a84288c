"""Listen at an address until told to stop; then finish what runs."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from ..core.errors import InputError
from .app import close

__all__ = ["listen"]

DRAIN = 5  # seconds for clients to read what was written


class Server(uvicorn.Server):
    """Closes the backend before the connections, so that every stream says how it has ended."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, grace: float, ready: Callable[[int], None]) -> None:
        super().__init__(config)
        self.app, self.grace, self.ready = app, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            self.ready(sockets[0].getsockname()[1])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await close(self.app, self.grace)
        await super().shutdown(sockets)


def listen(app: FastAPI, host: str, port: int, grace: float, ready: Callable[[int], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        port: 0 for any free one.
        grace: seconds in which running texts may end.
        ready: called with the port when it listens.

    Raises:
        InputError: the address cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except OSError as error:
        place.close()
        raise InputError(
            f"{host}:{port} cannot be listened at ({error.strerror or error}); give another --port or --host"
        ) from None
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=DRAIN)
    with place:
        Server(config, app, grace, ready).run(sockets=[place])
