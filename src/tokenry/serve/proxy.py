"""In front of another server: it writes, and here the methods watch.

Each text has a thread, in which its decode loop asks the server for chunks and checks them. What has settled goes to
whoever waits. Who leaves closes the connection to the server, which then stops writing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch
from transformers import PreTrainedTokenizerBase

from ..core.errors import InputError
from ..decode.engines.remote.api import job_for, sampling_of, watching
from ..decode.engines.remote.client import RemoteServer
from ..decode.engines.remote.loop import RemoteLoop, RemoteOptions, RemoteRow
from ..decode.generation.logprobs import UNKNOWN
from ..decode.generation.plugins import Plugins
from .backend import Broken, Busy, FinishReason, Piece, Ranked, Work
from .words import Words

__all__ = ["Proxy"]

REASONS: Mapping[str, FinishReason] = {
    "finished": "stop",
    "budget": "length",
    "context": "length",
    "cancelled": "cancelled",
}
NAME = "remote"


class Proxy:
    """A `Backend` whose texts another server writes. Of methods it takes those that watch the text.

    Args:
        server: the server; it is closed with the proxy.
        tokenizer: that of the server's model.
        rows: texts that are written at a time.
        waiting: texts that may wait beside these; a further one is refused as `Busy`.
        chunk: tokens of a request, as of `tokenry.decode.remote`.

    Raises:
        InputError: the server cannot be reached, or does not fit to the tokenizer.
    """

    def __init__(
        self,
        server: RemoteServer,
        tokenizer: PreTrainedTokenizerBase,
        rows: int = 64,
        waiting: int = 256,
        chunk: int | None = None,
    ) -> None:
        for what, value, least in (("rows", rows, 1), ("waiting", waiting, 0)):
            if value < least:
                raise InputError(f"{what}={value} is not possible; give a number >= {least}")
        self.server, self.tokenizer, self.chunk = server, tokenizer, chunk
        server.dialect(tokenizer)
        self.name, self.window = server.model or NAME, server.window
        self.rows, self.waiting = rows, waiting
        self.threads = ThreadPoolExecutor(rows, "tokenry proxy")
        self.texts: set[_Text] = set()
        self.closing = False
        self.counts = dict.fromkeys(("finished", "failed", "tokens_read", "tokens_written", "cache_bytes"), 0.0)

    async def stream(self, work: Work) -> AsyncIterator[Piece]:
        """See `Backend.stream`."""
        if self.closing:
            raise Busy("the server is closing; ask another one")
        if self.broken:
            raise Broken(self.broken)
        if len(self.texts) >= self.rows + self.waiting:
            raise Busy(f"{len(self.texts)} texts are being written or wait; try again in a moment")
        text = _Text(self._loop(work), work, self.tokenizer)
        running = asyncio.get_running_loop().run_in_executor(self.threads, text.write)
        running.add_done_callback(lambda written: self._end(text, written))
        self.texts.add(text)
        try:
            async for piece in text.pieces():
                yield piece
            self.counts["finished"] += 1
        finally:
            text.loop.cancel(0)
            self.texts.discard(text)
            self.counts["tokens_read"] += len(work.prompt_ids)
            self.counts["tokens_written"] += text.loop.stats.written
            running.cancel()  # of one that still waits

    def _end(self, text: _Text, written: asyncio.Future[None]) -> None:
        """Hand on the error in which a text has ended, if any."""
        error = None if written.cancelled() else written.exception()
        if error is not None:
            self.counts["failed"] += 1
            if self.broken:
                error = Broken(self.broken)
            elif not isinstance(error, Exception):  # which would end the event loop, too
                error = RuntimeError(f"the thread of a text has ended ({error!r})")
            text.outbox.put_nowait(error)

    @property
    def broken(self) -> str | None:
        """See `Backend.broken`."""
        return self.server.broken

    def numbers(self) -> Mapping[str, float]:
        """See `Backend.numbers`."""
        running = sum(text.loop.started for text in self.texts)
        return {"running": running, "waiting": len(self.texts) - running, **self.counts}

    async def close(self, seconds: float) -> None:
        """See `Backend.close`."""
        self.closing, end = True, time.monotonic() + seconds
        while self.texts and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for text in list(self.texts):
            text.loop.cancel(0)
        await asyncio.to_thread(self.threads.shutdown)
        await asyncio.to_thread(self.server.close)

    def _loop(self, work: Work) -> RemoteLoop:
        sampling, tokenizer = sampling_of(work.options), self.tokenizer
        prompt = torch.tensor([list(work.prompt_ids)], dtype=torch.long)
        further = {"max_new_tokens": work.max_new_tokens, "seed": work.seed, "stop": tuple(work.stop)}
        job = job_for(self.server, tokenizer, prompt, torch.ones_like(prompt), sampling, **further)
        options = RemoteOptions(sampling, self.chunk, logit_bias=work.logit_bias, top=_told(work))
        return RemoteLoop(self.server, job, tokenizer, Plugins(monitors=watching(work.methods, tokenizer)), options)


class _Text:
    """A text that is being written, and what of it goes out."""

    def __init__(self, loop: RemoteLoop, work: Work, tokenizer: PreTrainedTokenizerBase) -> None:
        self.loop, self.work = loop, work
        self.home = asyncio.get_running_loop()
        self.outbox: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.words = Words(tokenizer, work.prompt_ids, work.stop)
        self.told = 0  # tokens
        self.late = False

    async def pieces(self) -> AsyncIterator[Piece]:
        """What has settled, until the end."""
        clock = None
        if self.work.deadline is not None:
            clock = self.home.call_later(self.work.deadline, self._expire)
        try:
            while True:
                piece = await self.outbox.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            if clock is not None:
                clock.cancel()

    def _expire(self) -> None:
        self.late = True
        self.loop.cancel(0)

    def write(self) -> None:
        """Write it, in a thread."""
        for settled in self.loop.steps():
            if settled[0]:
                self._put(self._piece(settled[0]))
        self._put(self._last())

    def _put(self, piece: Piece) -> None:
        with suppress(RuntimeError):  # the event loop is closed, and with it whoever waited
            self.home.call_soon_threadsafe(self.outbox.put_nowait, piece)

    def _piece(self, ids: list[int]) -> Piece:
        count, first = self.work.logprobs, self.told
        self.told += len(ids)
        told = enumerate(ids, first) if count is not None else ()
        ranked = [_ranked(self.loop.rows[0], index, token, count or 0) for index, token in told]
        return Piece(ids, self.words.add(ids), ranked, self.words.offsets(len(ranked)))

    def _last(self) -> Piece:
        output = self.loop.output()
        events = [{k: v for k, v in vars(event).items() if k != "context_ids"} for event in output.events]
        reason = REASONS[(output.stop_reasons or ["finished"])[0]]
        return Piece(
            (),
            self.words.add((), last=True),
            finish="timeout" if self.late and reason == "cancelled" else reason,
            events=events,
        )


def _told(work: Work) -> int:
    """How many of the likeliest tokens the server has to tell."""
    return 0 if work.logprobs is None else max(work.logprobs, 1)


def _ranked(row: RemoteRow, index: int, token: int, count: int) -> Ranked:
    tops = row.tops.get(index, {})
    best = sorted(tops, key=lambda one: -tops[one])[:count]
    return Ranked(token, tops.get(token, UNKNOWN), {one: tops[one] for one in best})
