"""From a request to its texts: prompts as ids, what each text may be, the pieces of all of them, and the answer."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Send
from transformers import PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.fields import shown
from ..decode.contract import DecodeMethod
from ..models.prompts import Prompt, rendered
from ..text.token_text import check_encodable, special_tokens
from .answers import Answers, ChatAnswers, CompletionAnswers, Text
from .backend import Backend, Piece, Work
from .errors import Refused, told
from .metrics import Metrics, Watch
from .protocol import ChatRequest, CompletionRequest, KoboldRequest, Sampling

__all__ = ["LIMITS", "Limits", "Service"]

T = TypeVar("T")
Pieces = AsyncGenerator[tuple[int, Piece], None]  # with the number of the text
logger = logging.getLogger("tokenry.serve")

COMPLETION_TOKENS = 16  # what OpenAI writes where a completion does not say how much
KOBOLD_TOKENS = 100  # and what KoboldCpp does
GONE = 499  # what others log for a client that did not wait; nobody reads it


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes:
        tokens: of one text.
        texts: of one request, prompts times n.
        seconds: after which a text ends as it is; None: never.
        body: bytes of a request.
    """

    tokens: int = 4096
    texts: int = 16
    seconds: float | None = 600.0
    body: int = 2**20


LIMITS = Limits()


class Service:
    """Answers requests by a backend.

    Args:
        methods: the server's own, which act on every request.
        log_texts: log prompts and texts.
    """

    def __init__(
        self,
        backend: Backend,
        metrics: Metrics,
        methods: Sequence[DecodeMethod] = (),
        limits: Limits = LIMITS,
        log_texts: bool = False,
    ) -> None:
        self.backend, self.metrics, self.methods, self.limits = backend, metrics, methods, limits
        self.log_texts = log_texts
        self.reading = asyncio.Lock()  # a tokenizer is for one thread at a time
        self.keyed: dict[str, list[Keyed]] = {}  # by the key of the request, the oldest first

    async def complete(self, http: Request, asked: CompletionRequest) -> Response:
        """Answer /v1/completions."""
        self._check_model(asked.model)
        prompts = asked.prompts()
        ids = [await self._read(_text_ids, self.backend.tokenizer, prompt) for prompt in prompts]
        works = self._works(asked, ids, [one if isinstance(one, str) else None for one in prompts], COMPLETION_TOKENS)
        return await self._answer(http, asked, self._answers(CompletionAnswers, asked), works)

    async def chat(self, http: Request, asked: ChatRequest) -> Response:
        """Answer /v1/chat/completions."""
        self._check_model(asked.model)
        turns = [message.turn() for message in asked.messages]
        ids = await self._read(_chat_ids, self.backend.tokenizer, turns)
        works = self._works(asked, [ids], [turns], self.limits.tokens)
        return await self._answer(http, asked, self._answers(ChatAnswers, asked), works)

    async def continue_one(self, http: Request, asked: KoboldRequest, kind: type[Answers], *, stream: bool) -> Response:
        """Answer a request for one text, which `abort` can end."""
        self._check_model(asked.model)
        ids = await self._read(_text_ids, self.backend.tokenizer, asked.prompt)
        works = self._works(asked, [ids], [asked.prompt], KOBOLD_TOKENS)
        pieces = self._abortable(asked.genkey, self._watched(works))
        asked = asked.model_copy(update={"stream": stream})
        return await self._answer(http, asked, self._answers(kind, asked), works, pieces)

    def abort(self, key: str) -> bool:
        """End the texts of this key as they are; whether there was one."""
        found = self.keyed.get(key, ())
        for one in found:
            one.aborted.set()
        return bool(found)

    def written(self, key: str) -> str:
        """What there is of the newest text of this key; nothing where none is being written."""
        return self.keyed[key][-1].text if key in self.keyed else ""

    async def ids(self, text: str, special: bool) -> list[int]:
        """The ids of a text, with or without those that a prompt gets besides its own."""
        check_encodable(text, "prompt")
        return await self._read(partial(self.backend.tokenizer.encode, add_special_tokens=special), text)

    # --- what is to be written ---------------------------------------------------------------------------------

    def _check_model(self, name: str | None) -> None:
        if name and name != self.backend.name:
            raise Refused(
                f"there is no model {shown(name)}; this server has {self.backend.name!r}",
                "model",
                404,
                "model_not_found",
            )

    async def _read(self, encode: Any, *given: Any) -> list[int]:
        """Encode beside the event loop: a long prompt keeps nobody waiting but other prompts."""
        async with self.reading:
            return await run_in_threadpool(encode, *given)

    def _works(
        self, asked: Sampling, prompts: Sequence[list[int]], words: Sequence[Prompt | None], usual: int
    ) -> list[Work]:
        """One for each text, prompt by prompt.

        Args:
            words: what the ids of each prompt were made of, if they were.
            usual: how many tokens are written where the request is silent.
        """
        count = len(prompts) * asked.n
        if count > self.limits.texts:
            raise Refused(
                f"{len(prompts)} prompts with n={asked.n} make {count} texts; ask for at most {self.limits.texts} at a "
                "time",
                "n",
            )
        tokenizer = self.backend.tokenizer
        shared: dict[str, Any] = {
            "methods": asked.methods_in_force(self.methods),
            "options": asked.options(),
            "logit_bias": asked.biases(len(tokenizer), [*special_tokens(tokenizer).values()]),
            "stop": asked.stops(),
            "logprobs": asked.ranked(),
            "deadline": self.limits.seconds,
        }
        lengths = [self._length(asked, len(ids), usual) for ids in prompts]
        seeds = [None if asked.seed in (None, -1) else asked.seed + i for i in range(count)]
        order = [number for number in range(len(prompts)) for _ in range(asked.n)]
        return [Work(prompts[p], lengths[p], seed=seed, prompt=words[p], **shared) for p, seed in zip(order, seeds)]

    def _length(self, asked: Sampling, read: int, usual: int) -> int:
        """The most new tokens behind a prompt of `read` tokens."""
        wanted, window = asked.max_tokens, self.backend.window
        if wanted is not None and wanted > self.limits.tokens:
            raise Refused(
                f"max_tokens={wanted} is more than this server writes; give at most {self.limits.tokens}", "max_tokens"
            )
        least = wanted or 1
        if window is not None and read + least > window:
            raise Refused(
                f"the prompt has {read} tokens and with {least} new ones more than the model's window of {window}; "
                "shorten the prompt or give less max_tokens",
                "messages" if isinstance(asked, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        wanted = wanted or min(usual, self.limits.tokens)
        return wanted if window is None else min(wanted, window - read)

    def _answers(self, kind: type[Answers], asked: Sampling) -> Answers:
        plain = not asked.return_tokens_as_token_ids
        return kind(self.backend.name, self.backend.tokenizer, plain, asked.return_token_ids)

    # --- writing -----------------------------------------------------------------------------------------------

    async def _answer(
        self, http: Request, asked: Sampling, answers: Answers, works: Sequence[Work], pieces: Pieces | None = None
    ) -> Response:
        """Begin to write, and answer: at once with the whole, or as a stream from the first piece on."""
        texts = [Text(number, work) for number, work in enumerate(works)]
        ignored = asked.ignored()
        headers = {"X-Tokenry-Ignored": ", ".join(ignored)} if ignored else {}
        pieces = self._watched(works) if pieces is None else pieces
        try:
            if not asked.stream:
                await _while_there(http, self._write(texts, pieces))
                whole = answers.whole(texts)
                return JSONResponse(whole.model_dump(exclude_unset=True), headers=headers)
            first = await _while_there(http, anext(pieces))
        except Gone:
            return Response(status_code=GONE)
        counts = asked.stream_options is not None and asked.stream_options.include_usage
        return Events(self._events(answers, texts, first, pieces, counts), headers=headers)

    async def _write(self, texts: Sequence[Text], pieces: Pieces) -> None:
        """Write to the end."""
        async with aclosing(pieces):
            async for number, piece in pieces:
                texts[number].add(piece)
                if piece.finish == "cancelled":
                    raise Refused("the server is closing and has not finished the text; ask again", status=503)
        self._log(texts)

    async def _events(
        self,
        answers: Answers,
        texts: Sequence[Text],
        first: tuple[int, Piece],
        pieces: Pieces,
        counts: bool,
    ) -> AsyncIterator[str]:
        """The events of a stream. What goes wrong on the way is its last but one."""
        for chunk in answers.opening(texts):
            yield answers.event(chunk)
        try:
            async with aclosing(pieces):
                async for number, piece in _led(first, pieces):
                    texts[number].add(piece)
                    if piece.finish == "cancelled":
                        raise Refused("the server is closing and ends the text here; ask again", status=503)
                    if piece.text or piece.finish or piece.logprobs or answers.tell_ids:
                        yield answers.event(answers.chunk(texts[number], piece))
            self._log(texts)
            if counts:
                yield answers.event(answers.counted(texts))
        except InputError as error:
            yield answers.event(told(error))
        yield answers.done

    async def _watched(self, works: Sequence[Work]) -> Pieces:
        """(number of the text, piece) as they come, counted."""
        watches = [Watch(self.metrics) for _ in works]
        self.metrics.prompt.inc(sum({id(work.prompt_ids): len(work.prompt_ids) for work in works}.values()))
        async with aclosing(_merged(self.backend, works)) as pieces:
            async for number, piece in pieces:
                watches[number].saw(piece)
                yield number, piece

    async def _abortable(self, key: str, pieces: Pieces) -> Pieces:
        """Pieces of one text, until it is aborted: then it has stopped."""
        mine = Keyed()
        self.keyed.setdefault(key, []).append(mine)
        try:
            async with aclosing(pieces):
                while (one := await _unless(mine.aborted.wait(), _next(pieces))) is not None:
                    mine.text += one[1].text
                    yield one
        except Gone:
            yield 0, Piece((), "", finish="stop")
        finally:
            self.keyed[key].remove(mine)
            if not self.keyed[key]:
                del self.keyed[key]

    def _log(self, texts: Sequence[Text]) -> None:
        for text in texts if self.log_texts else ():
            prompt = self.backend.tokenizer.decode(list(text.work.prompt_ids))
            logger.info("%s", json.dumps({"prompt": prompt, "text": text.text}, ensure_ascii=False))


class Keyed:
    """A text that is being written, for those who know the key of its request."""

    def __init__(self) -> None:
        self.text, self.aborted = "", asyncio.Event()


class Gone(Exception):
    """The client has gone, or wants no more."""


class Events(StreamingResponse):
    """Server-sent events, whose source ends with them, also when the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], headers: dict[str, str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})

    async def stream_response(self, send: Send) -> None:
        async with aclosing(cast(AsyncGenerator[str, None], self.body_iterator)):
            await super().stream_response(send)


async def _while_there(http: Request, waited: Awaitable[T]) -> T:
    """What is waited for, unless the client goes first."""
    return await _unless(_gone(http), waited)


async def _unless(other: Awaitable[Any], waited: Awaitable[T]) -> T:
    """What is waited for, unless the other comes first: then it is given up.

    Raises:
        Gone: the other came first.
    """
    work, gone = asyncio.ensure_future(waited), asyncio.ensure_future(other)
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Gone
        return work.result()
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()
            with suppress(asyncio.CancelledError):
                await work


async def _gone(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _merged(backend: Backend, works: Sequence[Work]) -> Pieces:
    """The pieces of several texts as they come. They are held here for a client that reads slowly."""
    queue: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()

    async def write(number: int, work: Work) -> None:
        async with aclosing(cast(AsyncGenerator[Piece, None], backend.stream(work))) as pieces:
            async for piece in pieces:
                queue.put_nowait((number, piece))

    tasks = [asyncio.create_task(write(number, work)) for number, work in enumerate(works)]
    for number, task in enumerate(tasks):
        task.add_done_callback(lambda _, number=number: queue.put_nowait((number, None)))
    running = len(tasks)
    try:
        while running:
            number, piece = await queue.get()
            if piece is None:
                _raise_error(tasks[number])
                running -= 1
            else:
                yield number, piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _raise_error(text: asyncio.Task[None]) -> None:
    """Raise what the text has ended with, if that was an error. One that is no fault of the request goes to the log."""
    error = text.exception()
    if isinstance(error, InputError):
        raise error
    if error is not None:
        logger.error("a text has failed", exc_info=error)
        raise Refused("the server failed at this text; its log says where", status=500) from None


async def _next(pieces: Pieces) -> tuple[int, Piece] | None:
    return await anext(pieces, None)


async def _led(first: T, rest: AsyncIterator[T]) -> AsyncIterator[T]:
    """The first, and the rest."""
    yield first
    async for one in rest:
        yield one


def _text_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[int]) -> list[int]:
    """The ids of a prompt that is continued as it stands."""
    if not isinstance(prompt, str):
        highest = max(prompt)
        if highest >= len(tokenizer):
            raise Refused(f"prompt has the id {highest}; this model has ids 0 to {len(tokenizer) - 1}", "prompt")
        return prompt
    check_encodable(prompt, "the prompt")
    ids = tokenizer.encode(prompt) if prompt else []
    if not ids:
        raise Refused("the prompt is empty; give some text to continue", "prompt")
    return ids


def _chat_ids(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, Any]]) -> list[int]:
    """The ids of a conversation up to where the model's turn begins."""
    if not tokenizer.chat_template:
        raise Refused("this model has no chat template; use /v1/completions", "messages")
    for turn in turns:
        check_encodable(turn["content"], "a message")
    try:
        text = rendered(tokenizer, turns, add_generation_prompt=True)
    except InputError as error:
        reason = " ".join(str(error.__cause__ or "nothing comes of them").split())[:200]
        raise Refused(
            f"the chat template of this model does not take these messages ({reason}); change their roles or order, or "
            "use /v1/completions",
            "messages",
        ) from error
    return tokenizer.encode(text, add_special_tokens=False)
