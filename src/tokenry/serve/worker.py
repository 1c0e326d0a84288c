"""A worker that owns a model, and writes many texts at a time.

One thread does all that touches the model. In each turn it takes in what waits, feeds all texts that share the engine
in one forward, lets every other take one step, and hands out what has settled. So a short answer never waits for a
long one. A long prompt is read in chunks between the steps of the others.

A text does not share the engine if the model's cache cannot be put together (recurrent states, positions by columns),
or where a method drafts, skips layers, or has read the prompt into a cache; then it has an engine of its own. A method
that writes the whole text itself (denoising, specreason) keeps the others waiting.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from ..core.errors import InputError
from ..decode.contract import DecodeMethod, Plugins
from ..decode.engines.choice import open_shared
from ..decode.engines.shared import CountsBytes, Slot
from ..models.anatomy import vocabulary_size
from ..models.load import Loaded
from ..models.positions import context_window
from .backend import Broken, Busy, FinishReason, Piece, Work
from .writing import CHUNK, Alone, Guard, Shared, Whole, Writing, begun

__all__ = ["Worker"]

logger = logging.getLogger("tokenry.serve")

AT_ONCE = 1024  # tokens of prompts that are read in one turn while nobody writes
COUNTED = ("finished", "failed", "tokens_read", "tokens_reused", "tokens_written", "cache_bytes", "resting_bytes")
FORGET = 0.1  # share of the newest text in the mean time of one


class Worker:
    """A `Backend` with a model of its own.

    Args:
        name: of the model, as clients say it (default: that of its folder).
        rows: texts that are written at a time.
        waiting: texts that may wait beside these; a further one is refused as `Busy`.
        methods: decode methods for every text that does not bring one of the same kind.
        reuse_memory: bytes for texts that are over, so that one which begins like them is not read from its first token
            on; 0: every prompt is read anew.
    """

    def __init__(
        self,
        loaded: Loaded,
        name: str | None = None,
        rows: int = 32,
        waiting: int = 256,
        methods: Sequence[DecodeMethod] = (),
        reuse_memory: int = 2**30,
    ) -> None:
        for what, value, least in (("rows", rows, 1), ("waiting", waiting, 0), ("reuse_memory", reuse_memory, 0)):
            if value < least:
                raise InputError(f"{what}={value} is not possible; give a number >= {least}")
        self.loaded, self.tokenizer = loaded, loaded.tokenizer
        self.name = name or Path(loaded.model.name_or_path or "").name or type(loaded.model).__name__
        self.window = context_window(loaded.model)
        self.vocabulary = vocabulary_size(loaded.model)
        self.rows, self.waiting, self.methods = rows, waiting, tuple(methods)
        self.reuse_memory = reuse_memory
        self.engine = open_shared(loaded.model, rows, reuse_memory)
        self.queue: deque[Writing] = deque()
        self.running: list[Writing] = []
        self.broken: str | None = None  # why its thread has ended before its time
        self.closing: FinishReason | None = None  # "stop": let what runs end; "cancelled": end it
        self.changed = threading.Condition()
        self.counts = dict.fromkeys(COUNTED, 0.0)
        self.mean_seconds = 1.0  # of a text
        self.thread = threading.Thread(target=self._work, name=f"tokenry worker of {self.name}", daemon=True)
        self.thread.start()

    # --- for whoever asks, from any event loop -------------------------------------------------------------

    async def stream(self, work: Work) -> AsyncIterator[Piece]:
        """See `Backend.stream`. An error of this text comes out of the iteration."""
        writing = self._taken(work)
        try:
            while True:
                piece = await writing.pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            writing.left = True
            self._notify()

    def numbers(self) -> Mapping[str, float]:
        """What it counts, see `Backend.numbers`."""
        return {"running": len(self.running), "waiting": len(self.queue), **self.counts}

    async def close(self, seconds: float) -> None:
        """See `Backend.close`."""
        self._notify("stop")
        await asyncio.to_thread(self.thread.join, seconds)
        self._notify("cancelled")
        await asyncio.to_thread(self.thread.join)

    def _taken(self, work: Work) -> Writing:
        """Put work where the thread will find it."""
        work = self._checked(work)
        writing = Writing(work, asyncio.get_running_loop())
        with self.changed:
            if self.broken:
                raise Broken(self.broken)
            if self.closing:
                raise Busy("the server is about to end; ask another one, or later", self.mean_seconds)
            ahead = len(self.running) + len(self.queue)
            if ahead >= self.rows + self.waiting:
                raise Busy(
                    f"{len(self.running)} texts are being written and {len(self.queue)} wait, and no more may; ask "
                    "again later",
                    max(1.0, self.mean_seconds * (1 + len(self.queue)) / self.rows),
                )
            self.queue.append(writing)
            self.changed.notify()
        return writing

    def _checked(self, work: Work) -> Work:
        """The work with the methods of the server, as long as the window allows."""
        length, most = len(work.prompt_ids), work.max_new_tokens
        if self.window is not None and length >= self.window:
            raise InputError(
                f"the prompt has {length} tokens, the model's context window {self.window}; shorten the prompt"
            )
        unknown = [token for token in work.logit_bias if not 0 <= token < self.vocabulary]
        if unknown:
            raise InputError(f"logit_bias names token {unknown[0]}; this model has ids 0 to {self.vocabulary - 1}")
        own = {method.slug for method in work.methods}
        methods = (*(method for method in self.methods if method.slug not in own), *work.methods)
        if self.window is not None:
            most = min(most, self.window - length)
        return replace(work, methods=methods, max_new_tokens=most)

    def _notify(self, closing: FinishReason | None = None) -> None:
        with self.changed:
            self.closing = closing or self.closing
            self.changed.notify()

    # --- the thread ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _work(self) -> None:
        try:
            while self._has_work():
                self._turn()
        except BaseException as error:  # whatever it was, nobody shall wait for ever
            logger.critical("the worker of %s has ended", self.name, exc_info=error)
            self._break(type(error).__name__)

    def _break(self, error: str) -> None:
        """Say to whoever waits, and whoever comes, that nothing more is written. The model is left as it is."""
        with self.changed:
            self.broken = f"the worker of {self.name} has ended ({error}), as its log says; start the server again"
            self.running += self.queue
            self.queue.clear()
        for writing in self.running:
            writing.abandon(Broken(self.broken))
        self._hand_out()

    def _has_work(self) -> bool:
        """Wait for something to do; False: nothing will come."""
        with self.changed:
            self.changed.wait_for(lambda: self.running or self.queue or self.closing)
            return bool(self.running or self.queue)

    def _turn(self) -> None:
        self._dismiss()
        self._admit()
        self._feed_shared([w.progress for w in self.running if isinstance(w.progress, Shared)])
        for writing in self.running:
            if isinstance(writing.progress, Alone | Whole):
                with Guard(writing):
                    writing.progress.step()
        self.counts["cache_bytes"] = self.engine.cache_bytes() if isinstance(self.engine, CountsBytes) else 0
        self.counts["resting_bytes"] = 0 if self.engine is None else self.engine.resting_bytes()
        self._hand_out()

    def _dismiss(self) -> None:
        """End the texts that nobody waits for any more, and those that have no time left."""
        with self.changed:
            known = [*self.running, *self.queue]
        for writing in known:
            reason = self._why_dismissed(writing)
            if reason is None:
                continue
            with Guard(writing):
                if writing.progress is None:
                    writing.end(reason)
                else:
                    writing.progress.cancel(reason)

    def _why_dismissed(self, writing: Writing) -> FinishReason | None:
        if writing.left or self.closing == "cancelled":
            return "cancelled"
        return "timeout" if writing.expired else None

    def _admit(self) -> None:
        """Begin what waits, as long as there are rows."""
        with self.changed:
            waiting, room = [w for w in self.queue if not w.over], self.rows - sum(not w.over for w in self.running)
            ended = [w for w in self.queue if w.over]
            new = waiting[: max(room, 0)]
            self.queue = deque(waiting[len(new) :])
            self.running += [*ended, *new]
        for writing in new:
            with Guard(writing):
                writing.progress = begun(writing, self.loaded, self._engine_for)

    def _engine_for(self, plugins: Plugins) -> Slot | None:
        """A slot for a loop that needs nothing inside the model."""
        apart = plugins.speculation is not None or plugins.layer_policy is not None
        return None if apart or self.engine is None else Slot(self.engine)

    def _feed_shared(self, rows: Sequence[Shared]) -> None:
        """One forward for all that share, and a step of each whose block is fed whole."""
        if self.engine is None:
            return
        budget, fed, reading = AT_ONCE if all(row.reads for row in rows) else CHUNK, [], []
        for row in rows:
            if not row.begun and (not budget or (self.engine.begins_anywhere and any(map(row.follows, reading)))):
                continue
            with Guard(row.writing):
                block = row.block(budget)
                if row.reads:
                    budget -= len(block)
                    reading.append(row)
                if block:
                    fed.append((row, row.slot.feeding(len(block)), block))
        if not fed:
            return
        logits = {}
        with Guard(*(row.writing for row, _, _ in fed)):
            logits = self.engine.forward({number: block for _, number, block in fed})
        if not logits:  # nobody knows what it holds now
            self._open_again(rows)
        for row, number, block in fed:
            if number in logits:
                with Guard(row.writing):
                    row.receive(len(block), logits[number])

    def _open_again(self, rows: Sequence[Shared]) -> None:
        """A new engine, for those that are left too: they are still being read."""
        self.engine = open_shared(self.loaded.model, self.rows, self.reuse_memory)
        for row in rows:
            if not row.writing.over and self.engine is not None:
                row.begin_again(self.engine)

    # --- what goes out -------------------------------------------------------------------------------------

    def _hand_out(self) -> None:
        """Give the pieces of this turn to those who wait, with one call for each event loop."""
        homes: dict[asyncio.AbstractEventLoop, list[Writing]] = {}
        for writing in self.running:
            if writing.outbox:
                homes.setdefault(writing.home, []).append(writing)
        self._count()
        with self.changed:
            self.running = [writing for writing in self.running if not writing.over]
        for home, writings in homes.items():
            letters = [(writing, piece) for writing in writings for piece in writing.outbox]
            for writing in writings:
                writing.outbox = []
            with suppress(RuntimeError):  # the event loop is closed, and with it whoever waited
                home.call_soon_threadsafe(_deliver, letters)

    def _count(self) -> None:
        for writing in self.running:
            self.counts["tokens_read"] += writing.prompt_read - writing.counted[0]
            self.counts["tokens_written"] += writing.written - writing.counted[1]
            writing.counted = (writing.prompt_read, writing.written)
            if writing.over:
                self.counts["tokens_reused"] += writing.reused
                failed = isinstance(writing.outbox[-1], Exception)
                self.counts["failed" if failed else "finished"] += 1
                self.mean_seconds += FORGET * (time.monotonic() - writing.since - self.mean_seconds)


def _deliver(letters: Iterable[tuple[Writing, Piece | Exception]]) -> None:
    for writing, letter in letters:
        writing.pieces.put_nowait(letter)
