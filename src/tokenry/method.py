"""Method: the parameters of a published method, declared once.

A method is a frozen pydantic model. That one declaration gives validation in Python, the `-o name=value`
options of the command line, and the table in the documentation. Run-time state never lives here; it lives
in what applying the method opens (a context manager, a processor, a monitor).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from .errors import InputError

__all__ = ["Lines", "Method", "Option"]


class Option(NamedTuple):
    """One parameter as a person reads it."""

    name: str
    type: str
    range: str
    default: str
    description: str


def read_lines(value: Any) -> Any:
    """A list of strings, or the path of a text file with one entry per line (`[...]` is read as JSON)."""
    if not isinstance(value, str | Path):
        return value
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"this is not a JSON list ({error})") from None
    path = Path(value)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ValueError(
            f"the file {str(path)!r} cannot be read ({reason}); give a text file with one entry per line"
        ) from None
    return [line for line in lines if line]


Lines = Annotated[tuple[str, ...], BeforeValidator(read_lines)]


class Method(BaseModel):
    """Base of every method: frozen, validated parameters plus what the paper says.

    Class attributes: `slug` (name on the command line), `stage`, `title`, `paper` (title and arXiv number),
    `claim` (what the paper promises, in one sentence), `caution` (what a user must know before the first result, if
    anything).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    slug: ClassVar[str]
    stage: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    claim: ClassVar[str]
    caution: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(_explain(type(self), error)) from None

    @classmethod
    def options(cls) -> list[Option]:
        """The parameters in the order of their declaration."""
        rows, schemas = [], cls.model_json_schema()["properties"]
        for name, field in cls.model_fields.items():
            schema = schemas.get(name, {})
            default = "required" if field.is_required() else _show(field.get_default(call_default_factory=True))
            rows.append(Option(name, _type(schema), _range(schema), default, field.description or ""))
        return rows

    @classmethod
    def from_strings(cls, pairs: Iterable[str]) -> Method:
        """Build from `name=value` strings, as the command line gives them."""
        values: dict[str, str] = {}
        for pair in [pairs] if isinstance(pairs, str) else pairs:
            name, sign, value = pair.partition("=")
            if not sign:
                raise InputError(f"option {pair!r} has no value; write -o {pair}=VALUE")
            values[name.strip()] = value
        return cls(**values)


def _explain(cls: type[Method], error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    options = {option.name: option for option in cls.options()}
    if problem["type"] == "extra_forbidden":
        listed = ", ".join(f"{o.name} ({o.range or o.type})" for o in options.values())
        return f"{cls.slug} has no option {name!r}; its options are: {listed}"
    if problem["type"] == "missing":
        return f"{cls.slug} needs the option {name!r}: {options[name].description}"
    message = problem["msg"].removeprefix("Value error, ")
    if not name or problem["type"] == "value_error":
        prefix = f"{cls.slug}: " + (f"{name}: " if name else "")
        return prefix + message
    allowed = options[name].range or options[name].type
    return f"{cls.slug}: {name}={problem['input']!r} is not allowed ({message.lower()}); give {allowed}"


def _show(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "empty"
    return str(value)


def _variants(schema: dict) -> list[dict]:
    return [s for s in schema.get("anyOf", [schema]) if s.get("type") != "null"]


def _type(schema: dict) -> str:
    names = {"integer": "whole number", "number": "number", "boolean": "true or false", "string": "text"}
    kinds = [names.get(s.get("type", ""), "list" if s.get("type") == "array" else "") for s in _variants(schema)]
    return " or ".join(dict.fromkeys(k for k in kinds if k)) or "value"


def _range(schema: dict) -> str:
    for s in _variants(schema):
        if "enum" in s:
            return "one of " + ", ".join(map(str, s["enum"]))
        if "const" in s:
            return f"exactly {s['const']}"
        low, high = s.get("minimum", s.get("exclusiveMinimum")), s.get("maximum", s.get("exclusiveMaximum"))
        if low is not None and high is not None:
            left, right = "(" if "exclusiveMinimum" in s else "[", ")" if "exclusiveMaximum" in s else "]"
            return f"a number in {left}{low}, {high}{right}"
        if low is not None:
            return f"a number {'>' if 'exclusiveMinimum' in s else '>='} {low}"
        if high is not None:
            return f"a number {'<' if 'exclusiveMaximum' in s else '<='} {high}"
    return ""
