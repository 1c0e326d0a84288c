"""Traces in a file: the stage decode writes what the training of a filter reads."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..core.artifact import Header, header_of
from ..core.files import explained, parse_json
from ..core.outputs import write_file
from ..core.tensors import check_floats, check_range, check_tensors, read_tensors
from ..models.anatomy import fingerprint
from .confidence_filter import TraceDataset

__all__ = ["TraceHeader", "TraceWriter", "read_traces"]

FORMAT = 1
REMEDY = "write one with `tokenry decode --method learn2pd --save-traces FILE`"


class TraceHeader(Header):
    """What a file of traces says of itself: the model that was decoded with, and its weights."""

    model: str
    fingerprint: str


class TraceWriter:
    """Takes traces while the context lasts; they stand at `path` when it ends, in one safetensors file.

    An error or Ctrl-C keeps the traces taken so far; where there are none, or the disk is full, what was there before
    stays. They wait in memory (6 bytes for each position of a block): the head of a safetensors file names the lengths
    of what follows, so it cannot grow in place.

    Args:
        model: the one that is decoded with.
    """

    def __init__(self, path: str | Path, model: PreTrainedModel) -> None:
        self.path, self.model, self.parts, self.prompts = path, model, [], 0

    def add(self, traces: TraceDataset) -> None:
        """Take the traces of further prompts, which are numbered on."""
        self.parts.append(traces._replace(prompt_id=traces.prompt_id + self.prompts))
        self.prompts += int(traces.prompt_id.max()) + 1

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.parts:
            header = {
                "format": FORMAT,
                "model": self.model.config._name_or_path,
                "fingerprint": fingerprint(self.model),
            }
            tensors = {name: values.contiguous() for name, values in TraceDataset.join(self.parts)._asdict().items()}
            metadata = {"tokenry": json.dumps(header)}
            write_file(self.path, lambda part: save_file(tensors, part, metadata=metadata))


def read_traces(path: str | Path) -> tuple[TraceDataset, TraceHeader]:
    """What `TraceWriter` wrote.

    Raises:
        InputError: no traces, damaged ones, or some of a newer version.
    """
    with explained(f"{str(path)!r} cannot be read as traces", REMEDY):
        tensors, texts = read_tensors(path)
        if "tokenry" not in texts:
            raise ValueError("it has no header")
        header = header_of(parse_json(texts["tokenry"]), TraceHeader, FORMAT, f"the file of traces {str(path)!r}")
        return TraceDataset(**_checked(tensors)), header


def _checked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    check_tensors(tensors, {"conf": (None, None), "prompt_id": (None,)})
    records, block = tensors["conf"].shape
    if not records or not block:
        raise ValueError(f"the tensor 'conf' has the shape ({records}, {block}), so there is nothing in it")
    shapes = {"conf": (records, block), "label": (records, block), "mask": (records, block), "prompt_id": (records,)}
    check_tensors(tensors, shapes)
    check_floats(tensors, ["conf"])
    check_range("prompt_id", tensors["prompt_id"], 2**31)
    for name in ("label", "mask"):
        if tensors[name].dtype != torch.bool:
            raise ValueError(f"the tensor {name!r} is of the type {tensors[name].dtype}, not of true and false")
    return {name: tensors[name] for name in shapes}
