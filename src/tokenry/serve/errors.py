"""What is refused, in the shape that OpenAI's clients read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from ..core.errors import InputError
from ..core.fields import shown
from .backend import Broken, Busy

__all__ = ["ERRORS", "ErrorAnswer", "Refused", "answer_errors", "error_body", "refusal"]

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 413: "request_too_large", 429: "server_busy", 503: "server_closing"}


class Refused(InputError):
    """A request that cannot be done as it stands: `param` is the field, `status` that of HTTP."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


class ErrorInfo(BaseModel):
    """What went wrong, in one sentence; `param` is the field of the request."""

    message: str
    type: str
    param: str | None = Field(...)
    code: str | None = Field(...)


class ErrorAnswer(BaseModel):
    """An error as OpenAI writes it."""

    error: ErrorInfo


ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    info = ErrorInfo(message=message, type=kind, param=param, code=code or CODES.get(status))
    return ErrorAnswer(error=info).model_dump()


def refusal(
    message: str,
    status: int,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error as an answer."""
    return JSONResponse(error_body(message, status, param, code), status, headers=dict(headers or {}))


def refused(error: InputError) -> JSONResponse:
    """The answer to what an `InputError` says."""
    headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))} if isinstance(error, Busy) else {}
    return JSONResponse(told(error), status_of(error), headers)


def told(error: InputError) -> dict[str, Any]:
    """The JSON of an `InputError`."""
    if isinstance(error, Refused):
        return error_body(str(error), error.status, error.param, error.code)
    return error_body(str(error), status_of(error), code="server_broken" if isinstance(error, Broken) else None)


def status_of(error: InputError) -> int:
    """The status of HTTP that says what an `InputError` says."""
    if isinstance(error, Refused):
        return error.status
    return 429 if isinstance(error, Busy) else 503 if isinstance(error, Broken) else 400


def answer_errors(app: FastAPI) -> None:
    """Let every error of the application answer in this shape."""

    @app.exception_handler(InputError)
    async def input_error(request: Request, error: InputError) -> JSONResponse:
        return refused(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        message, param = _first(error.errors())
        return refusal(message, 400, param)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        message = MESSAGES.get(error.status_code, str(error.detail)).format(path=shown(request.url.path))
        return refusal(message, error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return refusal("the server failed at this request; its log says where", 500)


MESSAGES = {
    400: "the body is not JSON that can be read; send a JSON object",
    404: "there is nothing at {path}; the routes are /v1/models, /v1/completions and /v1/chat/completions",
    405: "{path} does not take this method; completions are asked for with POST, all else with GET",
    413: "the body of the request is too large; send at most 1 MB",
}


# What pydantic calls the ways to read a field that can be several things; they are no part of its name.
SHOULD = "Input should be "
WAY = re.compile(r"(str|int|float|bool|literal|list|dict|constrained|function)(\W.*)?")


def _first(problems: Sequence[Any]) -> tuple[str, str | None]:
    """The first problem of a request, in one sentence, and the field it is in."""
    problem = problems[0]
    raised = problem.get("ctx", {}).get("error")
    if isinstance(raised, Refused):
        return str(raised), raised.param
    if problem["type"] == "json_invalid":
        return f"the body is not JSON ({raised}); send a JSON object", None
    place = _place(problem)
    if not place:
        return f"the body is {shown(problem['input'])}; send a JSON object as application/json", None
    if problem["type"] == "missing":
        return f"the field {'.'.join(place)!r} is missing; give it", place[0]
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, "), place[0]
    said = [one["msg"] for one in problems if _place(one)[: len(place)] == place]
    kinds = [text.removeprefix(SHOULD) for text in dict.fromkeys(said) if text.startswith(SHOULD)]
    wanted = f"it should be {', or '.join(kinds)}" if kinds else said[0][:1].lower() + said[0][1:]
    return f"{'.'.join(place)}={shown(problem['input'])} is not allowed; {wanted}", place[0]


def _place(problem: Any) -> list[str]:
    """The path of the field that a problem is in."""
    parts = [str(part) for part in problem["loc"] if part != "body"]
    return list(takewhile(lambda part: not WAY.fullmatch(part), parts))
