"""What a decode method is made of: the plug-ins it brings to the loop."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessor

from ..core.errors import InputError
from ..core.method import Method
from ..core.schemas import Exchanged
from ..learned.confidence_filter import TraceDataset
from .generation.engine import LayerPolicy
from .generation.exchange import DecodeAnswer, DecodeRequest
from .generation.monitor import Monitor

__all__ = ["DecodeMethod", "Plugins", "TraceMethod"]


@dataclass(frozen=True)
class Plugins:
    """Plug-ins of the decode loop. Adding two sets combines them, in order."""

    processors: Sequence[LogitsProcessor] = ()
    monitors: Sequence[Monitor] = ()
    layer_policy: LayerPolicy | None = None
    interventions: Sequence[AbstractContextManager] = ()
    final_processors: Sequence[LogitsProcessor] = ()  # act last, after temperature and truncation
    speculation: Any = None  # a `tokenry.decode.speculation.loop.Speculation`

    def __add__(self, other: Plugins) -> Plugins:
        if self.speculation is not None and other.speculation is not None:
            raise InputError("two methods both draft; use one of them")
        if self.layer_policy is not None and other.layer_policy is not None:
            raise InputError("two methods both decide which layers run; use one of them")
        return Plugins(
            (*self.processors, *other.processors),
            (*self.monitors, *other.monitors),
            self.layer_policy or other.layer_policy,
            (*self.interventions, *other.interventions),
            (*self.final_processors, *other.final_processors),
            self.speculation or other.speculation,
        )


class TraceMethod(Method):
    """How a model's decoding is traced for the training of a decode method, with options of its own."""

    stage: ClassVar[str] = "decode"

    def collect(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        chat: bool = True,
    ) -> TraceDataset:
        """The traces of a batch of prompts, numbered from 0; each has some."""
        raise NotImplementedError


class DecodeMethod(Method):
    """A method of the decode stage: parameters, and the plug-ins they stand for on a given model.

    A method that must read the prompts before it knows what to do has no plug-ins but a `generate` of its own with the
    arguments of `tokenry.generate`, which hands over to it.

    Class attributes: `tracer` (what collects the traces that its training reads; none where it is not trained so).
    """

    stage: ClassVar[str] = "decode"
    tracer: ClassVar[type[TraceMethod] | None] = None
    input: ClassVar[type[Exchanged]] = DecodeRequest
    output: ClassVar[type[Exchanged]] = DecodeAnswer

    def plugins(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Plugins:
        """The plug-ins for one call of `generate`; new ones for every call."""
        raise NotImplementedError

    def beside(self, other: DecodeMethod) -> Any:
        """What stands for this method and another one that has a `generate` of its own, too."""
        raise InputError(f"{self.slug} and {other.slug} both read the prompts first; use one of them")
