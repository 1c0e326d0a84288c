"""Methods in a request: their fields come from each method's declaration, and no method is known here by name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any, Literal, get_args

from annotated_types import BaseMetadata
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, create_model

from .. import catalog
from ..core.artifact import Stored
from ..core.errors import InputError
from ..core.fields import shown
from ..core.method import Local, Method, explain
from ..decode.contract import DecodeMethod
from .errors import Refused

__all__ = ["MethodField", "in_force", "made"]

OURS = {Stored, Local}  # marks of options that are opened on the machine which runs the method


@cache
def offered() -> dict[str, type[DecodeMethod]]:
    """The methods that a request may name."""
    return {entry.slug: entry.load() for entry in catalog.by_stage("decode")}


@cache
def options_model(cls: type[Method]) -> type[BaseModel]:
    """The options of a method that a request may set, as JSON has them: no text stands for a file."""
    fields: dict[str, Any] = {"name": (Literal[cls.slug], Field(default=...))}
    for name, field in cls.model_fields.items():
        if not set(_marks(field.annotation, field.metadata)) & OURS:
            bounds = [part for part in field.metadata if isinstance(part, BaseMetadata)]
            kind = Annotated[field.annotation, *bounds] if bounds else field.annotation
            default = ... if field.is_required() else field.get_default(call_default_factory=True)
            fields[name] = (kind, Field(default=default, description=field.description))
    config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, title=cls.title)
    return create_model(f"{cls.__name__}Options", __config__=config, **fields)


def _marks(annotation: Any, metadata: Sequence[Any] = ()) -> Iterator[type]:
    """The classes of all that an annotation is marked with, in its parts, too."""
    yield from map(type, metadata)
    yield from map(type, getattr(annotation, "__metadata__", ()))
    for part in get_args(annotation):
        if not isinstance(part, str | int | float | bool):
            yield from _marks(part)


def made(value: Any) -> DecodeMethod:
    """The method that an entry of `methods` describes.

    Raises:
        Refused: there is no such method, or it has no such option, or another value is needed.
    """
    known = offered()
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise Refused(f"{shown(value)} is no method; give an object with a name, one of {', '.join(known)}", "methods")
    if value["name"] not in known:
        raise Refused(f"there is no method {shown(value['name'])}; give one of {', '.join(known)}", "methods")
    cls = known[value["name"]]
    model = options_model(cls)
    for name, field in cls.model_fields.items():
        if name not in model.model_fields and (name in value or field.is_required()):
            raise Refused(
                f"{cls.slug}: {name} is opened where the server runs and is not taken from a request; set it with "
                f"`tokenry serve --method {cls.slug} -o {name}=...`",
                "methods",
            )
    options = {name: option for name, option in value.items() if name != "name"}
    try:
        model.model_validate_json(json.dumps(value))
        return cls(**options)
    except ValidationError as error:
        raise Refused(explain(cls, error), "methods") from None
    except InputError as error:
        raise Refused(str(error), "methods") from None


def in_force(
    defaults: Sequence[DecodeMethod], named: Sequence[DecodeMethod], added: Sequence[DecodeMethod]
) -> list[DecodeMethod]:
    """The methods of a request: those of the server that it does not name, those it names, and what its clients' names
    for bans add."""
    slugs = {method.slug for method in named}
    return [*(method for method in defaults if method.slug not in slugs), *named, *added]


def _schema() -> Any:
    """Any of the methods that a request can describe."""
    models = [(cls, options_model(cls)) for cls in offered().values()]
    return reduce(
        or_, [m for c, m in models if all(n in m.model_fields for n, f in c.model_fields.items() if f.is_required())]
    )


MethodField = Annotated[Any, PlainValidator(made, json_schema_input_type=_schema())]
