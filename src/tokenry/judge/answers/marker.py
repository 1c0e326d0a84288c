"""The option that says where the answer of a solution is."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, WithJsonSchema

from ...text.answers import Marker, check_marker

__all__ = ["MarkerField"]

MarkerField = Annotated[
    Marker,
    AfterValidator(check_marker),
    WithJsonSchema({"type": "string"}),
    Field(
        description="where the answer is: boxed, answer (after 'A:', 'The answer is' or '####'), number (the last), or "
        "a regex with one group"
    ),
]
