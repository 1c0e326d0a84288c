"""What a JSON object must hold, declared once: its fields, their types and ranges."""

from __future__ import annotations

import re
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import InputError
from .files import shown

__all__ = ["Exchanged", "Fields", "Schema", "checked", "unmet"]

Schema = TypeVar("Schema", bound=BaseModel)


class Fields(BaseModel):
    """Values of exactly these types, and finite numbers; what else an object holds is kept."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)


class Exchanged(BaseModel):
    """What a method is given or answers, as JSON: these fields and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def checked(schema: type[Schema], value: Any, where: str, remedy: str) -> Schema:
    """A value as its schema says; `where` begins the refusal, `remedy` ends it."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise InputError(f"{where}: {unmet(error)}; {remedy}") from None


def unmet(error: ValidationError) -> str:
    """The first field that is not as it must be."""
    problem = error.errors(include_url=False)[0]
    name, given = ".".join(map(str, problem["loc"])), problem["input"]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"field {name!r} is missing"
    if not name:
        return message if problem["type"] == "value_error" else f"{shown(given)} is no object"
    return f"field {name!r} is {shown(given)}, {re.sub('^Input should', 'it should', message)}"
