"""What tokenry has stored: tensors and a header that says what they are, checked before anything is built of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import InputError
from .schemas import Fields, Schema, unmet

__all__ = ["Header", "check_tensors", "header_of", "read_tensors", "with_weights"]

Module = TypeVar("Module", bound=nn.Module)


class Header(Fields):
    """What every header holds."""

    format: int = Field(ge=1)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the texts beside them; call it inside `explained`."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def header_of(value: Any, schema: type[Schema], newest: int, what: str) -> Schema:
    """A header as its schema says; call it inside `explained`.

    Raises:
        InputError: a newer format; `what` says of what, such as "the probe in 'folder'".
        ValueError: the first field that is missing or wrong.
    """
    try:
        found = Header.model_validate(value).format
        if found > newest:
            raise InputError(f"{what} has format {found}, this version reads {newest}; update tokenry")
        return schema.model_validate(value)
    except ValidationError as error:
        raise ValueError(unmet(error)) from None


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int | None, ...]]) -> None:
    """Refuse tensors that lack one of these or have it in another shape; None is any length.

    Raises:
        ValueError: the first such tensor.
    """
    for name, shape in shapes.items():
        if name not in tensors:
            raise ValueError(f"the tensor {name!r} is missing")
        found = tuple(tensors[name].shape)
        if len(found) != len(shape) or any(a != b for a, b in zip(found, shape) if b is not None):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(f"the tensor {name!r} has the shape {found}, not ({wanted})")


def check_floats(tensors: Mapping[str, Tensor], names: Iterable[str], nan: bool = False) -> None:
    """Refuse tensors of another kind, and numbers that are not finite unless `nan`.

    Raises:
        ValueError: the first such tensor.
    """
    for name in sorted(names):
        if not tensors[name].is_floating_point():
            raise ValueError(f"the tensor {name!r} is of the type {tensors[name].dtype}, not of floating point")
        if not nan and not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(f"the tensor {name!r} has numbers that are not finite")


def with_weights(build: Callable[[], Module], weights: Mapping[str, Tensor]) -> Module:
    """What `build` makes, with these weights. They are compared with a copy without storage first, so that a header
    with absurd sizes costs nothing.

    Raises:
        ValueError: weights that are missing, unknown, of another shape or not finite.
    """
    with torch.device("meta"):
        wanted = build().state_dict()
    for name in sorted(weights.keys() - wanted.keys()):
        raise ValueError(f"the tensor {name!r} is not known")
    check_tensors(weights, {name: tuple(tensor.shape) for name, tensor in wanted.items()})
    check_floats(weights, [name for name in weights if wanted[name].is_floating_point()])
    made = build()
    made.load_state_dict(weights)
    return made


def check_range(name: str, values: Tensor, stop: float, start: float = 0) -> None:
    """Refuse values that are no whole numbers in [start, stop).

    Raises:
        ValueError: the tensor's name and what it holds.
    """
    if values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(f"the tensor {name!r} is of the type {values.dtype}, not of whole numbers")
    low, high = (float(values.min()), float(values.max())) if values.numel() else (start, -math.inf)
    if not (start <= low and high < stop):
        raise ValueError(f"the tensor {name!r} has values from {low:g} to {high:g}; {start:g} to below {stop:g} exist")
