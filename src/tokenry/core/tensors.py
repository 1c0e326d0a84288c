"""Tensors from files: read, and checked before anything is built of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["check_floats", "check_range", "check_tensors", "read_tensors", "tensor_file", "with_weights"]

Module = TypeVar("Module", bound="nn.Module")


@contextmanager
def tensor_file(path: str | Path) -> Iterator[Any]:
    """A safetensors file, open; call it inside `explained`."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the texts beside them; call it inside `explained`."""
    with tensor_file(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


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
    import torch

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
    import torch

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
    import torch

    if values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(f"the tensor {name!r} is of the type {values.dtype}, not of whole numbers")
    low, high = (float(values.min()), float(values.max())) if values.numel() else (start, -math.inf)
    if not (start <= low and high < stop):
        raise ValueError(f"the tensor {name!r} has values from {low:g} to {high:g}; {start:g} to below {stop:g} exist")
