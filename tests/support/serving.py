"""A backend for tests of the server: one thread that writes one text after the other with `tokenry.generate`."""

import asyncio
import queue
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from transformers.generation.streamers import BaseStreamer

import tokenry
from tokenry.serve.backend import Busy, Piece, Ranked
from tokenry.serve.words import Words

FINISH = {"finished": "stop", "budget": "length", "context": "length"}


class Left(Exception):
    """The text is not wanted any more; its argument says how it is reported."""


@dataclass
class Order:
    """A text to write, and where its pieces go."""

    work: object
    put: object  # called with a Piece or an exception, from any thread
    left: str | None = None  # set when the text is to end early, and how that is reported
    begun: float = field(default_factory=time.monotonic)


class Settled(BaseStreamer):
    """Sends each settled token on, and looks whether the text is wanted."""

    def __init__(self, backend, order):
        self.backend, self.order, self.ids = backend, order, []
        self.words = Words(backend.tokenizer, order.work.prompt_ids, order.work.stop)
        self.prompt_is_next = True

    def put(self, value):
        if self.prompt_is_next:
            self.prompt_is_next = False
            return
        for token in value.flatten().tolist():
            text = self.words.add([token])
            ranked = self.backend.ranked(self.order.work, self.ids, token)
            self.ids.append(token)
            self.backend.written += 1
            self.order.put(Piece([token], text, ranked, self.words.offsets(len(ranked))))
        time.sleep(self.backend.pause)
        late = self.order.work.deadline is not None and time.monotonic() > self.order.begun + self.order.work.deadline
        if self.order.left or late:
            raise Left(self.order.left or "timeout")

    def end(self):
        pass


class Bias:
    """Adds to scores."""

    def __init__(self, bias):
        self.bias = bias

    def __call__(self, ids, scores):
        scores = scores.clone()
        for token, value in self.bias.items():
            scores[:, token] += value
        return scores


class OneByOne:
    """The backend. `pause` is in seconds after every token; `waiting` is how many texts may wait."""

    def __init__(self, model, tokenizer, *, name="tiny", waiting=64, pause=0.0):
        self.model, self.tokenizer, self.name, self.pause, self.waiting = model, tokenizer, name, pause, waiting
        self.window = model.config.max_position_embeddings
        self.orders, self.now, self.closed, self.written, self.left = queue.Queue(), None, False, 0, 0
        threading.Thread(target=self._run, daemon=True).start()

    async def stream(self, work):
        if self.closed or self.orders.qsize() >= self.waiting:
            raise Busy(f"{self.orders.qsize()} texts are waiting; ask again later", retry_after=2.5)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
        order = Order(work, lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece))
        self.orders.put(order)
        finished = False
        try:
            while not finished:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                finished = piece.finish is not None
                yield piece
        finally:
            if not finished:
                self.left += 1
                order.left = "cancelled"

    broken = None

    def numbers(self):
        running = int(self.now is not None)
        return {"rows_running": running, "rows_waiting": self.orders.qsize(), "cache_bytes": 1024.0 * running}

    async def close(self, seconds):
        self.closed = True
        end = time.monotonic() + seconds
        while (self.now or self.orders.qsize()) and time.monotonic() < end:
            await asyncio.sleep(0.01)
        for order in [*self.orders.queue, *filter(None, [self.now])]:
            order.left = order.left or "cancelled"
        while self.now or self.orders.qsize():
            await asyncio.sleep(0.01)

    def ranked(self, work, ids, token):
        """The log-probabilities at one place, by a forward over all that is before it."""
        if work.logprobs is None:
            return []
        with torch.no_grad():
            logits = self.model(torch.tensor([[*work.prompt_ids, *ids]])).logits[0, -1]
        logprobs = logits.log_softmax(-1)
        best = logprobs.topk(work.logprobs)
        return [Ranked(token, float(logprobs[token]), dict(zip(best.indices.tolist(), best.values.tolist())))]

    def _run(self):
        while True:
            order = self.orders.get()
            self.now = order
            try:
                self._write(order)
            except (ValueError, RuntimeError, TypeError) as error:
                self._send(order, error)
            finally:
                self.now = None

    def _write(self, order):
        work, settled = order.work, Settled(self, order)
        try:
            if order.left:
                raise Left(order.left)
            out = tokenry.generate(
                self.model,
                self.tokenizer,
                [list(work.prompt_ids)],
                methods=work.methods,
                processors=[Bias(work.logit_bias)] if work.logit_bias else [],
                streamers=[settled],
                max_new_tokens=work.max_new_tokens,
                seed=work.seed,
                stop=work.stop,
                **work.options,
            )
        except Left as left:
            self._send(order, Piece([], "", finish=left.args[0]))
            return
        events = [{"kind": event.kind, "rule": event.rule, "index": event.index} for event in out.events]
        rest = settled.words.add((), last=True)
        self._send(order, Piece([], rest, finish=FINISH[out.stop_reasons[0]], events=events))

    def _send(self, order, piece):
        with suppress(RuntimeError):  # the loop of a client that has gone
            order.put(piece)
