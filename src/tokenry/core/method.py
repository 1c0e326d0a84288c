"""Method: the parameters of a published method, declared once.

A method is a frozen pydantic model. That one declaration gives validation in Python, the `-o name=value`
options of the command line, and the table in the documentation. Run-time state never lives here; it lives
in what applying the method opens (a context manager, a processor, a monitor).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo

from .claim import Claim
from .errors import InputError
from .fields import shown
from .files import parse_json, read_entries

__all__ = ["Lines", "Local", "Method", "Option", "explain"]


class Local:
    """Marks an option that names a file or a model, which is opened on the machine that runs the method: whoever asks
    from another one may not choose it."""


class Option(NamedTuple):
    """One parameter as a person reads it."""

    name: str
    type: str
    range: str
    default: str
    description: str


def read_lines(value: Any, what: str = "entries") -> Any:
    """A list of strings, or the path of a file with one entry per line or a JSON list (`[...]` itself is JSON too).

    Args:
        what: the name of the entries, in the plural.
    """
    if not isinstance(value, str | Path):
        return value
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return parse_json(value)
        except ValueError as error:
            raise ValueError(f"this is not a JSON list ({error})") from None
    return read_entries(value, what)


def read_words(value: Any) -> Any:
    """Words with commas between, or a JSON list of them."""
    if not isinstance(value, str):
        return value
    return read_lines(value) if value.lstrip().startswith("[") else tuple(map(str.strip, value.split(",")))


def _lines(value: Any, info: ValidationInfo) -> Any:
    return read_lines(value, info.field_name or "entries")


Lines = Annotated[tuple[str, ...], BeforeValidator(_lines)]


class Method(BaseModel):
    """Base of every method: frozen, validated parameters plus what the paper says.

    Class attributes: `slug` (name on the command line), `stage`, `title`, `paper` (title and arXiv number),
    `claim` (what the paper promises, in one sentence), `published` (its number, where one could be read), `caution`
    (what a user must know before the first result, if anything). The contract of a stage adds `input` and `output`:
    what a method is given and what it answers, as JSON.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    slug: ClassVar[str]
    stage: ClassVar[str]
    title: ClassVar[str]
    paper: ClassVar[str]
    claim: ClassVar[str]
    published: ClassVar[Claim | None] = None
    caution: ClassVar[str] = ""
    input: ClassVar[type[BaseModel]]
    output: ClassVar[type[BaseModel]]

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(explain(type(self), error)) from None

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
    def schema(cls) -> dict[str, Any]:
        """Slug, stage and title, and the JSON schemas of input, options and output: all that an HTTP route or a page
        needs to offer the method without knowing it."""
        models = {"input": cls.input, "options": cls, "output": cls.output}
        schemas = {name: model.model_json_schema() for name, model in models.items()}
        return {"slug": cls.slug, "stage": cls.stage, "title": cls.title, **schemas}

    @classmethod
    def from_strings(cls, pairs: Iterable[str]) -> Method:
        """Build from `name=value` strings, as the command line gives them."""
        values: dict[str, str] = {}
        for pair in [pairs] if isinstance(pairs, str) else pairs:
            name, sign, value = pair.partition("=")
            if not sign:
                raise InputError(f"option {shown(pair)} has no value; write -o {pair[:60]}=VALUE")
            if name.strip() in values:
                raise InputError(f"option {shown(name.strip())} is given twice; give it once")
            values[name.strip()] = value
        return cls(**values)


def explain(cls: type[Method], error: ValidationError) -> str:
    """What is wrong with the options of a method, in one sentence."""
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else ""
    options = {option.name: option for option in cls.options()}
    if problem["type"] == "extra_forbidden":
        listed = ", ".join(f"{o.name} ({o.range or o.type})" for o in options.values())
        return f"{cls.slug} has no option {shown(name)}; its options are: {listed}"
    if problem["type"] == "missing":
        return f"{cls.slug} needs the option {name!r}: {options[name].description}"
    message = problem["msg"].removeprefix("Value error, ")
    if not name or problem["type"] == "value_error":
        prefix = f"{cls.slug}: " + (f"{name}: " if name else "")
        return prefix + message
    allowed = options[name].range or options[name].type
    why = message[:1].lower() + message[1:]
    return f"{cls.slug}: {name}={shown(problem['input'])} is not allowed ({why}); give {allowed}"


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
    if any(s.get("format") == "path" for s in _variants(schema)):
        return "path"
    return " or ".join(dict.fromkeys(k for k in kinds if k)) or "value"


def _range(schema: dict) -> str:
    for s in _variants(schema):
        if s.get("items", {}).get("type") in ("integer", "number") and len(_variants(schema)) == 1:
            return _range(s["items"]).replace("a number", "numbers")
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
