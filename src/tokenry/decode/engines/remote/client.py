"""An OpenAI-compatible server, seen from here: its address, its model, its dialect, and the patience it needs.

Requests run in one event loop in a thread of their own. Whoever asks gets a future; to cancel it closes the connection,
by which servers know that nobody waits any more.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import warnings
from collections.abc import AsyncGenerator, Coroutine, Sequence
from concurrent.futures import Future
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from transformers import PreTrainedTokenizerBase

from ....core.errors import InputError
from ....core.fields import shown
from ....core.files import parse_json, refusing
from ....text.token_text import REPLACEMENT
from .dialects import VLLM, Continuation, Dialect, LlamaServer, Request, TextOnly
from .streams import EVENTS, Stream, Teller, events_of, message_of, read_events

if TYPE_CHECKING:
    import httpx

__all__ = ["RemoteServer"]

T = TypeVar("T")
logger = logging.getLogger("tokenry.remote")

AGAIN = (429, 500, 502, 503, 504)  # a later try may do better
FIRST_WAIT, LONGEST_WAIT = 0.25, 30.0  # seconds
CONNECT = 10.0  # seconds that a connection may take
PROBE = "The old lighthouse"
PROBED = 4  # tokens
NO_IDS = (400, 415, 422)  # what servers answer that do not take ids as a prompt, or refuse fields they do not know
REMEDY = "give the address of an OpenAI-compatible server, such as http://127.0.0.1:8000"


class RemoteServer:
    """A server with `POST /v1/completions`: vLLM, llama-server, TabbyAPI, and what speaks like them.

    What it is for, and what it calls its model, is found out when it is first used. Close it, or use it as a context.

    Args:
        url: its address, with or without /v1.
        model: the name of the model there; None takes the first one that the server lists.
        api_key: sent as bearer token.
        dialect: "vllm", "llama.cpp" or "text"; None asks the server for a few tokens and looks at the answer.
        timeout: seconds that an answer may take.
        retries: how often a request is made again, after longer and longer waits, when the server cannot be reached, is
            overloaded (429) or fails (5xx). A wait that the server asks for is kept.

    Attributes:
        window: the most tokens of prompt and text together, where the server says so.
        streams: whether it tells tokens while it writes, so that a request can be closed in the middle.
        broken: why no request can be made any more; None while there is no such reason.

    Raises:
        InputError: no address; httpx is not installed.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        dialect: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
    ) -> None:
        self.httpx, self.url, self.model = _httpx(), url, model
        if dialect not in (None, VLLM.name, LlamaServer.name, TextOnly.name):
            raise InputError(f"dialect={dialect!r} is unknown; use 'vllm', 'llama.cpp', 'text', or None")
        if not timeout > 0 or retries < 1:
            raise InputError(f"timeout={timeout}, retries={retries} are not allowed; give both a number > 0")
        self.wanted, self.timeout, self.retries = dialect, timeout, retries
        self.window: int | None = None
        self.streams = False
        self._known: Dialect | None = None
        self._learning = threading.Lock()
        self.http = self.httpx.AsyncClient(
            base_url=self._address(url),
            headers=_headers(api_key),
            timeout=self.httpx.Timeout(timeout, connect=min(timeout, CONNECT)),
            limits=self.httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )
        self.events = asyncio.new_event_loop()
        self.broken: str | None = None
        self._breaking = threading.Lock()
        self._closing = asyncio.Event()
        self.thread = threading.Thread(target=self._work, name=f"tokenry {url}", daemon=True)
        self.thread.start()

    def __enter__(self) -> RemoteServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        if self.events.is_closed():
            return
        self._break(f"{self._where} is closed; open it again")
        self.events.call_soon_threadsafe(self._closing.set)
        self.thread.join()
        self.events.close()

    def _work(self) -> None:
        """The thread of the requests. If it fails, they do: nobody shall wait for ever."""
        try:
            self.events.run_until_complete(self._closing.wait())
        except BaseException as error:
            self._break(
                f"{self._where} can be asked no more, as the thread of its requests has ended "
                f"({type(error).__name__}); open it again"
            )
            logger.critical("%s", self.broken, exc_info=error)
        self.events.run_until_complete(self._end())

    def _break(self, reason: str) -> None:
        """From now on nobody can ask; the first reason stands."""
        with self._breaking:
            self.broken = self.broken or reason

    async def _end(self) -> None:
        await asyncio.sleep(0)  # a request that came last begins, so that it can be told why it ends
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        await self.http.aclose()

    # --- what it is ----------------------------------------------------------------------------------------

    def dialect(self, tokenizer: PreTrainedTokenizerBase) -> Dialect:
        """How it is spoken to. Asked for the first time, it looks for the model, probes, and warns where the server
        tells text alone.

        Raises:
            InputError: it cannot be reached, has no such model, or its tokens are not those of the tokenizer.
        """
        with self._learning:
            if self._known is None:
                self._look_for_model()
                self._known = self._probed(tokenizer) if self.wanted is None else _named(self.wanted, tokenizer)
                if not self._known.tells:
                    warnings.warn(
                        f"{self._where} tells text alone, which is tokenized here; its own tokens may differ",
                        stacklevel=2,
                    )
            return self._known

    def _look_for_model(self) -> None:
        try:
            listed = self._run(self._answer("GET", "v1/models")).result().get("data")
        except _Refused as error:
            if error.status != 404:
                raise
            return
        models = [model for model in listed or [] if isinstance(model, dict) and isinstance(model.get("id"), str)]
        if self.model is None and models:
            self.model = models[0]["id"]
        mine = next((model for model in models if model["id"] == self.model), {})
        meta = mine.get("meta")
        window = mine.get("max_model_len", meta.get("n_ctx") if isinstance(meta, dict) else None)
        self.window = window if isinstance(window, int) else None

    def _probed(self, tokenizer: PreTrainedTokenizerBase) -> Dialect:
        ids, text_only = tokenizer.encode(PROBE, add_special_tokens=False), TextOnly(tokenizer)
        request, vllm, llama = Request(ids, [], PROBED, top=1), VLLM(), LlamaServer()
        try:
            answer = self._run(self._ask(vllm, request)).result()
        except _Refused as error:
            if error.status not in NO_IDS:
                raise
            self.complete(text_only, request).result()
            return text_only
        with self._reading():
            choice = answer["choices"][0]
            kind: Dialect = vllm if "token_ids" in choice else llama if llama.wrote(choice) else text_only
        try:
            wrote = self.complete(kind, request).result().ids
        except _Refused as error:
            if error.status != 404:
                raise
            return text_only  # of llama-server, something passes on what is OpenAI's alone
        if isinstance(kind, Teller):
            self._check_tokens(tokenizer, wrote, choice.get("text"))
            self.streams = self._run(self._streamed(kind, request)).result() == wrote
        return kind

    async def _streamed(self, dialect: Teller, request: Request) -> list[int] | None:
        """The tokens that the server tells while it writes; None if it does not, or as nobody can read."""
        try:
            return [token async for came in self._parts(dialect, request) for token in came.ids]
        except InputError:
            return None

    def _check_tokens(self, tokenizer: PreTrainedTokenizerBase, ids: list[int], text: Any) -> None:
        mine = cast(str, tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        if isinstance(text, str) and REPLACEMENT not in text + mine and text.strip() != mine.strip():
            raise InputError(
                f"the server at {self.url!r} wrote {shown(text)}, and the tokenizer reads its tokens as {shown(mine)}; "
                "give the tokenizer of the server's model (--tokenizer)"
            )

    def room(self, lengths: Sequence[int]) -> list[int] | None:
        """How many tokens its window leaves behind prompts of these lengths; None where that is not known.

        Raises:
            InputError: none for one of them.
        """
        if self.window is None:
            return None
        if max(lengths) >= self.window:
            raise InputError(
                f"the prompt has {max(lengths)} tokens, the server's context window {self.window}; shorten the prompt"
            )
        return [self.window - length for length in lengths]

    # --- requests ------------------------------------------------------------------------------------------

    def complete(self, dialect: Dialect, request: Request) -> Future[Continuation]:
        """Ask for a continuation. To cancel the future closes the connection.

        The future raises InputError where the server refuses, cannot be reached, or answers what is no completion.
        """
        return self._run(self._completion(dialect, request))

    def stream(self, dialect: Dialect, request: Request, along: bool) -> Stream:
        """Ask for a continuation, and take it as it comes, or in one piece if not `along`."""
        if along and isinstance(dialect, Teller) and request.count > 1:
            return Stream(self._run, self._parts(dialect, request))
        return Stream(self._run, self._whole(dialect, request))

    async def _whole(self, dialect: Dialect, request: Request) -> AsyncGenerator[Continuation, None]:
        yield await self._completion(dialect, request)

    async def _parts(self, dialect: Teller, request: Request) -> AsyncGenerator[Continuation, None]:
        """What comes, as it comes. A connection that breaks ends it, unless nothing has come."""
        response = await self._sent("POST", dialect.path, self._body(dialect, request) | {"stream": True}, True)
        came, count = None, 0
        try:
            if EVENTS not in response.headers.get("content-type", ""):
                raise InputError(f"{self._where} does not stream")
            async for events in events_of(response):
                with self._reading():
                    came = read_events(dialect, events, request, count)
                count += len(came.ids)
                yield came
        except self.httpx.TransportError as error:
            if not count:
                raise InputError(f"{self._where} broke off ({type(error).__name__}); try again later") from None
        finally:
            await response.aclose()

    async def _completion(self, dialect: Dialect, request: Request) -> Continuation:
        answer = await self._ask(dialect, request)
        with self._reading():
            return dialect.read(answer, request)

    async def _ask(self, dialect: Dialect, request: Request) -> dict[str, Any]:
        return await self._answer("POST", dialect.path, self._body(dialect, request))

    def _body(self, dialect: Dialect, request: Request) -> dict[str, Any]:
        return ({"model": self.model} if self.model else {}) | dialect.body(request)

    def _reading(self) -> Any:
        return refusing(lambda error: f"{self._where} answered no completion ({type(error).__name__}); {REMEDY}")

    async def _answer(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that the server answers, sooner or later."""
        return self._read(await self._sent(method, path, body))

    async def _sent(
        self, method: str, path: str, body: dict[str, Any] | None = None, stream: bool = False
    ) -> httpx.Response:
        """What the server answers, sooner or later; of a stream, its beginning."""
        request = self.http.build_request(method, path, json=body)
        for attempt in range(self.retries + 1):
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT)
            try:
                response = await self.http.send(request, stream=stream)
                if stream and not response.is_success:
                    await response.aread()
            except self.httpx.ReadTimeout:
                raise InputError(
                    f"{self._where} gave no answer within {self.timeout:g} seconds; ask for fewer tokens at a time, or "
                    "give it more time"
                ) from None
            except self.httpx.TransportError as error:
                problem = f"cannot be reached ({str(error) or type(error).__name__}); check that it runs there"
            else:
                if response.status_code not in AGAIN:
                    return response
                problem = f"answers {response.status_code} ({_message(response)}); try again later"
                wait = _asked_wait(response) or wait
            if attempt < self.retries:
                await asyncio.sleep(wait)
        raise InputError(f"{self._where} {problem}")

    def _read(self, response: httpx.Response) -> dict[str, Any]:
        status = response.status_code
        if status in (401, 403):
            raise _Refused(f"{self._where} wants another API key ({_message(response)}); give --api-key", status)
        if not response.is_success:
            raise _Refused(f"{self._where} refuses the request ({status}): {_message(response)}", status)
        try:
            answer = parse_json(response.text)
        except ValueError as error:
            raise InputError(f"{self._where} answered what is no JSON ({error}); {REMEDY}") from None
        if not isinstance(answer, dict):
            raise InputError(f"{self._where} answered a JSON {type(answer).__name__}, no object; {REMEDY}")
        return answer

    @property
    def _where(self) -> str:
        return f"the server at {self.url!r}"

    def _run(self, request: Coroutine[Any, Any, T]) -> Future[T]:
        with self._breaking:
            if not self.broken:
                return asyncio.run_coroutine_threadsafe(self._unless_broken(request), self.events)
        request.close()
        raise InputError(self.broken)

    async def _unless_broken(self, request: Coroutine[Any, Any, T]) -> T:
        try:
            return await request
        except asyncio.CancelledError:
            if self.broken:
                raise InputError(self.broken) from None
            raise

    def _address(self, url: str) -> httpx.URL:
        try:
            given = self.httpx.URL(url.strip() if urlsplit(url).hostname else "")
        except (ValueError, self.httpx.InvalidURL):
            given = self.httpx.URL("")
        if given.scheme not in ("http", "https") or not given.host:
            raise InputError(f"{shown(url)} is no address of a server; give one such as http://127.0.0.1:8000")
        return given.copy_with(path=given.path.rstrip("/").removesuffix("/v1") + "/", query=None, fragment=None)


class _Refused(InputError):
    """The server does not take the request as it is."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _httpx() -> ModuleType:
    try:
        import httpx
    except ImportError:
        raise InputError("another server is asked by httpx, which is missing; `pip install tokenry[remote]`") from None
    return httpx


def _headers(api_key: str | None) -> dict[str, str]:
    if not api_key:
        return {}
    if not api_key.isascii() or not api_key.isprintable():
        raise InputError("the API key has characters that no header takes; give it as the server has shown it")
    return {"Authorization": f"Bearer {api_key}"}


def _named(name: str, tokenizer: PreTrainedTokenizerBase) -> Dialect:
    known: dict[str, Dialect] = {VLLM.name: VLLM(), LlamaServer.name: LlamaServer()}
    return known.get(name) or TextOnly(tokenizer)


def _message(response: httpx.Response) -> str:
    """What the server says itself, on one line."""
    try:
        said = parse_json(response.text)
    except ValueError:
        said = response.text
    return message_of(said) or response.reason_phrase


def _asked_wait(response: httpx.Response) -> float | None:
    """The seconds that the server asks to wait."""
    try:
        return min(max(float(response.headers.get("retry-after", "")), 0.0), LONGEST_WAIT)
    except ValueError:
        return None
