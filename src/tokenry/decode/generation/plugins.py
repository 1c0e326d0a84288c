"""Plug-ins of the decode loop: what a method brings to it, as one object."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ...core.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase
    from transformers.generation.logits_process import LogitsProcessor
    from transformers.generation.streamers import BaseStreamer

    from .job import Job
    from .layer_policy import LayerPolicy
    from .monitor import Monitor
    from .output import DecodeOutput

__all__ = ["NO_PLUGINS", "BeginsLast", "BeginsWithPrompt", "Drafting", "Ends", "Plugins", "Steps"]


@runtime_checkable
class BeginsWithPrompt(Protocol):
    """A logits processor that is told where the prompt ends."""

    def begin(self, prompt_length: int) -> None: ...


@runtime_checkable
class BeginsLast(Protocol):
    """A final processor that is told where the prompt ends, and what of it (batch, prompt) is no padding."""

    def begin(self, prompt_length: int, attention_mask: Tensor) -> None: ...


@runtime_checkable
class Ends(Protocol):
    """A processor that is told when a generation is over, also when it fails or is given up."""

    def end(self) -> None: ...


class Steps(Protocol):
    """A generation that goes on step by step, see `DecodeLoop`."""

    def steps(self) -> Generator[list[list[int]], None, None]: ...

    def cancel(self, row: int) -> None: ...

    def generate(self, streamers: Sequence[BaseStreamer] = ()) -> DecodeOutput: ...

    def output(self) -> DecodeOutput: ...


class Drafting(Protocol):
    """Several tokens per step: it has a decode loop of its own, on an engine with what that needs."""

    def loop(self, engine: Any, job: Job, tokenizer: PreTrainedTokenizerBase | None, plugins: Plugins) -> Steps: ...


@dataclass(frozen=True)
class Plugins:
    """Plug-ins of the decode loop. Adding two sets combines them, in order.

    Attributes:
        processors: change the scores that are stored.
        monitors: watch the text, and have tokens taken back.
        layer_policy: which layers run.
        interventions: context managers around the generation.
        final_processors: logits processors that act last, after temperature and truncation.
        speculation: drafts several tokens per step.
    """

    processors: Sequence[LogitsProcessor] = ()
    monitors: Sequence[Monitor] = ()
    layer_policy: LayerPolicy | None = None
    interventions: Sequence[AbstractContextManager] = ()
    final_processors: Sequence[LogitsProcessor] = ()
    speculation: Drafting | None = None

    def __add__(self, other: Plugins) -> Plugins:
        return Plugins(**{f.name: _joined(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})


NO_PLUGINS = Plugins()
ONE_ALONE = {"layer_policy": "decide which layers run", "speculation": "draft"}


def _joined(name: str, one: Any, other: Any) -> Any:
    if name not in ONE_ALONE:
        return (*one, *other)
    if one is not None and other is not None:
        raise InputError(f"two methods both {ONE_ALONE[name]}; use one of them")
    return one if other is None else other
