"""One text while a worker writes it: from the work that came in to the pieces that go out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..core.errors import InputError
from ..decode.api import EngineFor, generate, opened
from ..decode.contract import LoopMethod, RunnerMethod
from ..decode.engines.resting import common_beginning, pays
from ..decode.engines.shared import SharedEngine, Slot
from ..decode.generation.engine import TransformersEngine
from ..decode.generation.loop import DecodeLoop
from ..decode.generation.output import DecodeOutput
from ..models.load import Loaded
from .backend import FinishReason, Piece, Ranked, Work
from .words import Words

__all__ = ["CHUNK", "Alone", "Guard", "Shared", "Whole", "Writing", "begun"]

logger = logging.getLogger("tokenry.serve")

CHUNK = 256  # tokens of prompts that are read in one turn while others write
LASTING = getattr(torch, "AcceleratorError", ())  # older versions of torch have none of its own
REASONS: dict[str, FinishReason] = {"finished": "stop", "budget": "length", "context": "length"}


class Writing:
    """A text that was asked for, and who waits for its pieces."""

    def __init__(self, work: Work, home: asyncio.AbstractEventLoop) -> None:
        self.work, self.home = work, home
        self.pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self.since = time.monotonic()
        self.left = False  # nobody waits any more
        self.over = False
        self.outbox: list[Piece | Exception] = []
        self.prompt_read = self.written = 0  # tokens
        self.reused = 0  # tokens of the prompt that need not be read
        self.counted: tuple[int, int] = (0, 0)  # of what was read and written, by the worker
        self.words: Words | None = None
        self.progress: Shared | Alone | Whole | None = None  # None: it waits

    @property
    def expired(self) -> bool:
        return self.work.deadline is not None and time.monotonic() - self.since > self.work.deadline

    # --- what goes out -------------------------------------------------------------------------------------

    def put(self, ids: Sequence[int], ranked: Sequence[Ranked] = ()) -> None:
        """More tokens have settled."""
        if ids and self.words is not None:
            self.written += len(ids)
            self.outbox.append(Piece(ids, self.words.add(ids), ranked, self.words.offsets(len(ranked))))

    def end(self, reason: FinishReason, output: DecodeOutput | None = None) -> None:
        """It has ended; the last piece says why, and what was repaired."""
        events = [{k: v for k, v in vars(e).items() if k != "context_ids"} for e in (output and output.events) or ()]
        last = Piece((), "" if self.words is None else self.words.add((), last=True))
        newest = self.outbox[-1] if self.outbox else None
        if isinstance(newest, Piece):  # the tokens of this step, and that they were the last
            self.outbox.pop()
            last = replace(newest, text=newest.text + last.text)
        self._close(replace(last, finish=reason, events=events, reused=self.reused))

    def fail(self, error: Exception) -> None:
        """It has ended in an error, which whoever waits will get; one that comes after the end goes to the log."""
        if self.over:
            logger.error("what a text held could not be given back", exc_info=error)
        else:
            self._close(error)

    def abandon(self, error: Exception) -> None:
        """It ends in an error, and what it holds is not given back: nobody can use that any more."""
        self.progress = None
        if not self.over:
            self._close(error)

    def _close(self, last: Piece | Exception) -> None:
        self.over = True
        self.outbox.append(last)
        progress, self.progress = self.progress, None
        if progress is not None:
            with Guard(self):
                progress.close()


class Guard:
    """An error within the block is handed to those who wait for these texts, and ends no other. One of the accelerator
    goes on: after that nothing works there."""

    def __init__(self, *writings: Writing) -> None:
        self.writings = writings

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if not isinstance(error, Exception) or isinstance(error, LASTING):
            return False
        for writing in self.writings:
            writing.fail(error)
        return True


class Shared:
    """A decode loop in a slot of the engine that others share."""

    def __init__(self, writing: Writing, loop: DecodeLoop, slot: Slot) -> None:
        self.writing, self.loop, self.slot = writing, loop, slot
        self.prompt = np.array(loop.rows[0].prompt)
        self.unfed: list[int] = []
        self.stack = ExitStack()
        self.stack.callback(slot.free)
        self.stack.enter_context(loop.running())

    @property
    def reads(self) -> bool:
        """Whether its prompt is not read yet."""
        return not self.loop.prefilled

    @property
    def begun(self) -> bool:
        """Whether the engine knows it."""
        return self.slot.number is not None

    def follows(self, other: Shared) -> bool:
        """Whether a text that is being read will soon have what this one can begin with."""
        common = common_beginning(self.prompt[:-1], other.prompt)
        return pays(common, len(self.prompt)) and len(other.prompt) - len(other.unfed) < common

    def begin_again(self, shared: SharedEngine) -> None:
        """What was read of its prompt is lost, and there is another engine."""
        self.slot.shared, self.slot.number, self.unfed = shared, None, []

    def block(self, most: int) -> list[int]:
        """What it has to be fed next: at most so many tokens of its prompt, or all that came after that."""
        if not self.unfed:
            self.unfed = self.loop.pending()[0][0].tolist()
        if not self.begun:
            self.writing.reused = self.slot.begin(self.unfed)
            del self.unfed[: self.writing.reused]
        return self.unfed[:most] if self.reads else self.unfed

    def receive(self, count: int, logits: Tensor) -> None:
        """The first `count` tokens that were pending are fed."""
        if self.reads:
            self.writing.prompt_read += count
        del self.unfed[:count]
        if not self.unfed:
            _take(self.writing, self.loop, self.loop.receive(logits[None])[0])

    def cancel(self, reason: FinishReason) -> None:
        self.loop.cancel(0)
        self.writing.end(reason, self.loop.output())

    def close(self) -> None:
        self.stack.close()


class Alone:
    """A decode loop with an engine of its own, which takes a step in its turn."""

    def __init__(self, writing: Writing, loop: DecodeLoop) -> None:
        self.writing, self.loop, self.steps = writing, loop, loop.steps()

    def step(self) -> None:
        settled = next(self.steps)
        self.writing.prompt_read = self.loop.prompt_length - self.loop.unread
        _take(self.writing, self.loop, settled[0])

    def cancel(self, reason: FinishReason) -> None:
        self.loop.cancel(0)
        self.writing.end(reason, self.loop.output())

    def close(self) -> None:
        self.steps.close()


def _take(writing: Writing, loop: DecodeLoop, settled: list[int]) -> None:
    """Hand on what has settled in a step, and whether it was the last one."""
    told = loop.ranked[0][writing.written : writing.written + len(settled)]
    writing.put(settled, told)
    if not loop.active:
        output = loop.output()
        writing.end(REASONS[(output.stop_reasons or ["finished"])[0]], output)


class Whole:
    """A method that writes the whole text itself, while the others wait. It is asked for its progress where it streams,
    and can be ended there."""

    def __init__(self, writing: Writing, run: Callable[[BaseStreamer], DecodeOutput]) -> None:
        self.writing, self.run = writing, run

    def step(self) -> None:
        try:
            output = self.run(_Watch(self.writing))
        except _Ended:
            self.writing.end("timeout" if self.writing.expired else "cancelled")
            return
        ids, reasons = output.new_ids[0], output.stop_reasons
        self.writing.prompt_read = len(output.prompt_ids[0])
        self.writing.put(ids)
        full = "length" if len(ids) >= self.writing.work.max_new_tokens else "stop"
        self.writing.end(REASONS[reasons[0]] if reasons else full, output)

    def cancel(self, reason: FinishReason) -> None:
        self.writing.end(reason)

    def close(self) -> None:
        pass


class _Ended(Exception):
    """Nobody wants to read on."""


class _Watch(BaseStreamer):
    """Looks at each new part of a text whether somebody still wants it."""

    def __init__(self, writing: Writing) -> None:
        self.writing = writing

    def put(self, value: Tensor) -> None:
        if self.writing.left or self.writing.expired:
            raise _Ended

    def end(self) -> None:
        pass


def begun(writing: Writing, loaded: Loaded, engine: EngineFor | None) -> Shared | Alone | Whole:
    """Begin a text.

    Args:
        engine: as `opened` takes it; where it gives a `Slot`, the text is one of those that share.

    Raises:
        InputError: what cannot be done.
    """
    work, (model, tokenizer) = writing.work, loaded
    readers = [method for method in work.methods if not isinstance(method, LoopMethod)]
    asks_words = bool(readers) and work.prompt is not None
    given: Mapping[str, Any] = {
        "methods": work.methods,
        "seed": work.seed,
        "stop": work.stop,
        "max_new_tokens": work.max_new_tokens,
        "chat": asks_words and not isinstance(work.prompt, str),
        **_options(work),
    }
    prompt = work.prompt if asks_words and work.prompt is not None else list(work.prompt_ids)
    writing.words = Words(tokenizer, work.prompt_ids, work.stop)
    if readers and isinstance(readers[0], RunnerMethod):
        return Whole(writing, lambda watch: generate(model, tokenizer, prompt, streamers=[watch], **given))
    loop = opened(model, tokenizer, prompt, engine=engine, **given)
    if loop.plugins.interventions:
        raise InputError("a method brings contexts that change the model for every text; leave it out")
    if isinstance(loop.engine, Slot):
        return Shared(writing, loop, loop.engine)
    if isinstance(loop.engine, TransformersEngine) and loop.engine.takes_chunks and not loop.plugins.speculation:
        loop.chunk = CHUNK
    return Alone(writing, loop)


def _options(work: Work) -> dict[str, Any]:
    options = dict(work.options)
    if work.logit_bias:
        options["sequence_bias"] = {(token,): float(bias) for token, bias in work.logit_bias.items()}
    if work.logprobs is not None:
        options["logprobs"] = work.logprobs
    return options
