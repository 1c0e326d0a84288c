"""What methods for masked-diffusion models share: they bring parts to the diffusion loop, alone or several together."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.fields import Tokens
from ...models.prompts import Prompts, encode_prompts
from ..contract import Call, DecodeMethod, RunnerMethod, refuse_others
from ..generation.options import ending
from .loop import (
    DiffusionOutput,
    LengthPolicy,
    LogitsTransform,
    MaskedDiffusionModel,
    diffusion_generate,
    sampling_warpers,
)
from .unmask import Threshold, UnmaskPolicy

__all__ = ["DiffusionMethod", "DiffusionMethods", "DiffusionParts"]

Cache = Literal["none", "prefix", "dual"]


@dataclass(frozen=True)
class DiffusionParts:
    """What a method brings to `diffusion_generate`. Adding those of two methods combines them.

    Attributes:
        unmask: a rule of its own for what is committed.
        threshold: else commit what is at least this probable.
        transforms: act on the logits, in order.
        length: how wide the windows are.
        gen_length: the width they begin with, if not that of the call.
    """

    unmask: UnmaskPolicy | None = None
    threshold: float | None = None
    transforms: tuple[LogitsTransform, ...] = ()
    length: LengthPolicy | None = None
    gen_length: int | None = None

    def __add__(self, other: DiffusionParts) -> DiffusionParts:
        if self.unmask and other.unmask:
            raise InputError("two methods both decide what is committed; use one of them")
        if self.length and other.length:
            raise InputError("two methods both decide how wide the window is; use one of them, or switch it off in one")
        thresholds = {t for t in (self.threshold, other.threshold) if t is not None}
        unmask = self.unmask or other.unmask
        if len(thresholds) > 1 and unmask is None:
            raise InputError(f"two methods commit at different thresholds, {sorted(thresholds)}; give both the same")
        return DiffusionParts(
            unmask,
            next(iter(thresholds), None),
            self.transforms + other.transforms,
            self.length or other.length,
            self.gen_length or other.gen_length,
        )

    def options(self) -> dict[str, Any]:
        """Arguments of `diffusion_generate`."""
        unmask = self.unmask or (None if self.threshold is None else Threshold(self.threshold))
        width = {} if self.gen_length is None else {"gen_length": self.gen_length}
        return {"unmask": unmask, "transforms": self.transforms, "length": self.length, **width}


class DiffusionMethods:
    """Methods for masked-diffusion models that act together; stands for them in `tokenry.generate`."""

    def __init__(self, methods: Sequence[DecodeMethod]) -> None:
        refuse_others(methods[0], [method for method in methods if not isinstance(method, DiffusionMethod)])
        self.methods = tuple(method for method in methods if isinstance(method, DiffusionMethod))
        self.slug = " and ".join(method.slug for method in methods)

    def options(self, max_new_tokens: int) -> dict[str, Any]:
        """Arguments of `diffusion_generate`; policies and transforms are new ones."""
        each = [method.parts(max_new_tokens) for method in self.methods]
        parts = sum(each[1:], each[0])
        for method, own in zip(self.methods, each):
            if parts.unmask and not own.unmask and method.threshold_option in method.model_fields_set:
                raise InputError(
                    f"{method.threshold_option} of {method.slug} would have no effect, as another method decides what "
                    "is committed; leave it out"
                )
        return {
            "gen_length": max_new_tokens,
            "block_length": self._agreed("block_length"),
            "cache": self._agreed("cache"),
            **parts.options(),
        }

    def _agreed(self, name: str) -> Any:
        """An option that all must share; one that was given goes before defaults."""
        given = {getattr(method, name) for method in self.methods if name in method.model_fields_set}
        if len(given) > 1:
            raise InputError(f"{self.slug} are given different values of {name}, {sorted(given)}; give one")
        return next(iter(given), getattr(self.methods[0], name))

    def run(
        self,
        model: PreTrainedModel | MaskedDiffusionModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        call: Call,
    ) -> DiffusionOutput:
        """See `DiffusionMethod.run`."""
        sampling = {**SAMPLING, **{name: value for name, value in call.options.items() if name in SAMPLING}}
        self._refuse_foreign({**vars(call.plugins), "stop": call.stop, **call.options})
        options = self.options(call.max_new_tokens)
        if not isinstance(model, MaskedDiffusionModel):
            model = MaskedDiffusionModel(model, tokenizer)
        for method in self.methods:
            method.check(model, sampling["do_sample"])
        inputs = encode_prompts(tokenizer, prompts, call.chat).to(model.device)
        rows = len(inputs["input_ids"])
        if call.streamers and len(call.streamers) != rows:
            raise InputError(f"{len(call.streamers)} streamers for {rows} rows; give one streamer per row")
        with ending(call.streamers) as streamers:
            output = diffusion_generate(
                model,
                inputs["input_ids"],
                inputs.get("attention_mask"),
                warpers=sampling_warpers(**sampling),
                seed=call.seed,
                tokenizer=tokenizer,
                **options,
            )
            for row, streamer in enumerate(streamers):
                streamer.put(torch.tensor(output.prompt_ids[row]))
                streamer.put(torch.tensor(output.new_ids[row]))
        return output

    def _refuse_foreign(self, given: dict[str, Any]) -> None:
        for name, value in given.items():
            if name not in SAMPLING and not _asks_nothing(value):
                raise InputError(
                    f"{self.slug} does not write from left to right and has no use for {name}; leave it out"
                )


SAMPLING = {"do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def _asks_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, Sized) and len(value) == 0)


class DiffusionMethod(RunnerMethod):
    """A decode method that needs a masked-diffusion model. It has no plug-ins for the other loop, which goes from left
    to right, but `parts` for this one.

    Class attributes: `threshold_option` (the option that is the `threshold` of its parts).
    """

    threshold_option: ClassVar[str] = "threshold"

    block_length: Tokens = Field(default=32, description="tokens of a block; the window is filled block by block")
    cache: Cache = Field(default="none", description="keys and values kept within a block")

    def parts(self, max_new_tokens: int) -> DiffusionParts:
        """What it brings to the loop for windows of at most `max_new_tokens`; new ones for every call."""
        raise NotImplementedError

    def check(self, model: MaskedDiffusionModel, do_sample: bool) -> None:
        """Refuse a model, or drawn tokens, that it was not made for."""

    def run(
        self,
        model: PreTrainedModel | MaskedDiffusionModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts,
        call: Call,
        others: Sequence[DecodeMethod] = (),
    ) -> DiffusionOutput:
        """Fill a window of `max_new_tokens` after each prompt. `others` of this kind act together with it.

        Args:
            prompts: a prompt or several, see `encode_prompts`.
            call: of `options`, do_sample, temperature, top_k, top_p and min_p. `seed` is that of all that is drawn,
                tokens and positions; streamers get their row when it is finished, since it does not grow from left to
                right.

        Raises:
            InputError: empty prompt, a model that is causal or has no mask token, a window that is no multiple of the
                block or beyond the model's context, a plug-in of the other loop.
        """
        return DiffusionMethods([self, *others]).run(model, tokenizer, prompts, call)
