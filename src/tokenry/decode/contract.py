"""What a decode method is: one of three kinds, told apart by their classes, and what each is given and gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..core.errors import InputError
from ..core.method import Method
from ..core.schemas import Exchanged
from .generation.exchange import DecodeAnswer, DecodeRequest
from .generation.plugins import NO_PLUGINS, Plugins

if TYPE_CHECKING:  # a method is imported in other engines, too, beside other versions of transformers
    from torch import Tensor
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from ..learned.confidence_filter import TraceDataset
    from ..models.prompts import Prompts
    from .completion.offers import Completion
    from .generation.continuation import ContinuationLogitsProcessor
    from .generation.monitor import Monitor
    from .generation.output import DecodeOutput

__all__ = [
    "Call",
    "CompletionMethod",
    "DecodeMethod",
    "LogitsMethod",
    "LoopMethod",
    "MonitorMethod",
    "Plan",
    "PlanMethod",
    "Plugins",
    "RunnerMethod",
    "TraceMethod",
    "refuse_others",
]


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
    """A method of the decode stage: a `LoopMethod`, a `PlanMethod` or a `RunnerMethod`.

    Class attributes: `tracer` (what collects the traces that its training reads; none where it is not trained so).
    """

    stage: ClassVar[str] = "decode"
    tracer: ClassVar[type[TraceMethod] | None] = None
    input: ClassVar[type[Exchanged]] = DecodeRequest
    output: ClassVar[type[Exchanged]] = DecodeAnswer


class LoopMethod(DecodeMethod):
    """A method that brings plug-ins to the decode loop."""

    def plugins(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Plugins:
        """The plug-ins for one call of `generate`; new ones for every call."""
        raise NotImplementedError


class LogitsMethod(LoopMethod):
    """A loop method that is a function of the ids alone: a logits processor, in any engine that takes one."""

    def processor(
        self, tokenizer: PreTrainedTokenizerBase | None = None, prompt_length: int | None = None
    ) -> ContinuationLogitsProcessor:
        """A new logits processor with these parameters.

        Args:
            tokenizer: looks up what was given as text.
            prompt_length: columns of the prompts in plain `generate`, see `ContinuationLogitsProcessor`.
        """
        raise NotImplementedError


class MonitorMethod(LoopMethod):
    """A `LoopMethod` that watches the text alone: it works where another server has the scores, too."""

    def monitors(self, tokenizer: PreTrainedTokenizerBase) -> Sequence[Monitor]:
        """The monitors for one generation."""
        raise NotImplementedError

    def plugins(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Plugins:
        return Plugins(monitors=self.monitors(tokenizer))


class PlanMethod(DecodeMethod):
    """A method that reads the prompts, and then says how the decode loop continues them."""

    def plan(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, call: Call) -> Plan:
        """How these prompts are continued."""
        raise NotImplementedError


class RunnerMethod(DecodeMethod):
    """A method that writes the texts itself."""

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        call: Call,
        others: Sequence[DecodeMethod] = (),
    ) -> DecodeOutput:
        """The texts. `others` are further methods of the call that are no `LoopMethod`; they act together, or are
        refused."""
        raise NotImplementedError

    def generate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, **options: Any
    ) -> DecodeOutput:
        """Write with this method alone; `options` are those of `tokenry.generate`."""
        return self.run(model, tokenizer, prompts, Call.of(**options))


class CompletionMethod(RunnerMethod):
    """A `RunnerMethod` that also ranks what may stand at a place of a source file, for an editor."""

    def complete(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        offset: int | None = None,
        name: str = "the source",
    ) -> Sequence[Completion]:
        """The completions at a character of the source, best first.

        Args:
            offset: by default behind the last character.
            name: of the file, in refusals; its ending tells the language.
        """
        raise NotImplementedError


def refuse_others(method: DecodeMethod, others: Sequence[DecodeMethod]) -> None:
    """Refuse methods that would read the prompts beside this one."""
    if others:
        raise InputError(f"{method.slug} and {others[0].slug} both read the prompts first; use one of them")


@dataclass(frozen=True)
class Call:
    """What a call of `tokenry.generate` asks for, besides prompts and methods. `options` are for `model.generate`."""

    plugins: Plugins = NO_PLUGINS
    max_new_tokens: int = 256
    seed: int | None = None
    stop: str | Sequence[str] = ()
    chat: bool = True
    streamers: Sequence[BaseStreamer] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, **options: Any) -> Call:
        """From the keyword arguments of `tokenry.generate`."""
        names = [[f.name for f in fields(one)] for one in (Plugins, cls)]
        plugins, own = ({name: options.pop(name) for name in known if name in options} for known in names)
        return cls(Plugins(**plugins), **own, options=options)


@dataclass(frozen=True)
class Plan:
    """How prompts that were read are continued.

    Attributes:
        prompts: the encoded prompts.
        plugins: act after all others.
        options: for `model.generate`; they go before those of the call.
        strategy: the name of how each row is answered.
        probs: (batch, strategies), what that was chosen by.
        tokens_read: tokens fed to the model already, in one forward; 0 for none.
    """

    prompts: BatchEncoding
    plugins: Plugins
    options: Mapping[str, Any]
    strategy: list[str] | None = None
    probs: Tensor | None = None
    tokens_read: int = 0

    def finish(self, output: DecodeOutput) -> DecodeOutput:
        """The output with what the plan says of it."""
        output.strategy, output.probs = self.strategy, self.probs
        output.forward_calls += bool(self.tokens_read)
        output.tokens_processed += self.tokens_read
        return output
