"""SkipDecode: later tokens run fewer layers.

Paper: SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference, arXiv
2307.02628. Depth depends on the position alone and never grows, so every layer that a token runs holds all earlier
tokens: batches and the cache work as always, and the cost is known beforehand.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Layers, Multiple, Positive, Tokens, read_ids
from ..hooks.holding import hooked
from ..hooks.layers import LayerSwitch
from ..hooks.residual import Feed, on_feed
from ..hooks.skip_schedule import SkipSchedule, skip_forward
from ..models.anatomy import decoder_body, decoder_layers
from .contract import LoopMethod, Plugins
from .generation.layer_policy import layers_needed

__all__ = ["SkipDecode", "SkipPolicy", "SkipSchedule", "skip_forward"]

Depths = Annotated[tuple[Layers, ...] | None, BeforeValidator(read_ids)]


class SkipDecode(LoopMethod):
    """Fewer layers for later tokens.

    In plain `generate` it is a context manager on the model, and needs `planned_new_tokens`:
    `with SkipDecode(e_min=20, planned_new_tokens=100)(model): model.generate(...)`.
    """

    slug: ClassVar[str] = "skipdecode"
    title: ClassVar[str] = "SkipDecode"
    paper: ClassVar[str] = (
        "SkipDecode: Autoregressive Skip Decoding with Batching and Caching for Efficient LLM Inference, "
        "arXiv 2307.02628"
    )
    claim: ClassVar[str] = (
        "A model that is fine-tuned for it decodes 2 to 5 times faster, at little loss, when later tokens run fewer "
        "of the lower middle layers."
    )
    published: ClassVar[Claim] = Claim(
        "2 to 5", "times faster at negligible loss", "OPT-1.3B and 6.7B, E2E, Reddit-TLDR, CNN/DM"
    )
    caution: ClassVar[str] = (
        "a model that was not trained with skipped layers writes worse text with every layer that is skipped; measure "
        "quality before you trust the speed"
    )

    e_min: int | None = Field(
        default=None, ge=2, le=1024, description="layers of the last planned token; none: half of the layers"
    )
    e_max: int | None = Field(
        default=None, ge=2, le=1024, description="layers of the prompt and the first token; none: all"
    )
    warmup: Layers = Field(default=2, description="first layers that always run")
    schedule: Literal["linear", "constant", "power"] = Field(
        default="linear", description="how depth falls behind the prompt; constant: e_min at once"
    )
    power: Positive = Field(default=2.0, description="exponent of the schedule 'power'")
    planned_new_tokens: Tokens | None = Field(
        default=None, description="new tokens after which e_min is reached; none: max_new_tokens"
    )
    target_speedup: Multiple | None = Field(
        default=None,
        description="times fewer layers, instead of e_min: 2 runs half of them on average",
    )
    depths: Depths = Field(
        default=None, description="layers of each new token, instead of e_min and a schedule: 30,28,26"
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> SkipDecode:
        given = [name for name in ("e_min", "target_speedup", "depths") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} both decide how many layers run; give one of them")
        return self

    def schedule_for(self, num_layers: int, prompt_len: int, planned_new_tokens: int) -> SkipSchedule:
        """The schedule of a model with so many layers, and a prompt of so many columns."""
        settings: dict[str, Any] = {
            "warmup": self.warmup,
            "prompt_len": prompt_len,
            "planned_new_tokens": self.planned_new_tokens or planned_new_tokens,
            "kind": self.schedule if self.depths is None else "custom",
            "power": self.power,
            "depths": self.depths or (),
        }
        if self.target_speedup is not None:
            return SkipSchedule.for_speedup(self.target_speedup, num_layers, self.e_max, **settings)
        return SkipSchedule(num_layers, self.e_max, self.e_min, **settings)

    def plugins(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Plugins:
        return Plugins(layer_policy=SkipPolicy(self, model))

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Iterator[None]:
        """Skip layers in plain `generate`, one prompt batch after the other."""
        if self.planned_new_tokens is None:
            raise InputError("plain generate does not say how many tokens will come; give planned_new_tokens=N")
        if model.config.is_encoder_decoder:
            raise InputError(f"{type(model).__name__} has an encoder; skipdecode takes decoder-only models")
        follower = _Follower(SkipPolicy(self, model), LayerSwitch(model))
        done = hooked(decoder_body(model), lambda *_: follower.running.close(), always_call=True)
        with follower.running, on_feed(model, follower.begin), done:
            yield


class SkipPolicy:
    """The `LayerPolicy` of a method: makes the schedule when the prompt is known."""

    def __init__(self, method: SkipDecode, model: PreTrainedModel) -> None:
        self.method, self.num_layers = method, len(decoder_layers(model))
        unmet = [layer for layer in layers_needed(model) if layer >= method.warmup]
        if unmet:
            raise InputError(
                f"warmup={method.warmup} is not enough for {type(model).__name__}: masks are sized from layer "
                f"{max(unmet)}, the first of its kind of attention; give warmup={max(unmet) + 1} or more"
            )
        method.schedule_for(self.num_layers, 1, 1)  # refuses what this model has not

    def begin(self, prompt_columns: int, new_columns: int | None) -> None:
        planned = self.method.planned_new_tokens
        length = planned or new_columns
        if length is None:
            raise InputError("nobody says how many tokens will come; give planned_new_tokens=N")
        if planned is not None and new_columns is not None and new_columns > planned:
            warn_beyond(planned, new_columns)
        self.schedule = self.method.schedule_for(self.num_layers, prompt_columns, length)

    def layers(self, column: int) -> frozenset[int]:
        return self.schedule.layers(column)


def warn_beyond(planned: int, new: int) -> None:
    warnings.warn(
        f"{new} new tokens go beyond planned_new_tokens={planned}; the rest runs e_min layers. Plan for all of them to "
        "skip later.",
        stacklevel=2,
    )


class _Follower:
    """Sets the layers before each forward of plain `generate`; `running` is closed after it."""

    def __init__(self, policy: SkipPolicy, switch: LayerSwitch) -> None:
        self.policy, self.switch = policy, switch
        self.running = ExitStack()
        self.stop = 0  # columns fed so far
        self.warned = False

    def begin(self, feed: Feed) -> None:
        self._check(feed)
        if feed.start == 0 or self.stop == 0:  # a new prompt, perhaps behind a cache that was there before
            self._check_prompt(feed.mask)
            self.policy.begin(feed.stop, None)
            self.warned = False
        elif not self.warned and feed.stop > self.policy.schedule.end:
            self.warned = True
            warn_beyond(self.policy.schedule.planned_new_tokens, feed.stop - self.policy.schedule.prompt_len)
        self.stop = feed.stop
        self.running.enter_context(self.switch.only(self.policy.layers(feed.stop - 1)))

    def _check(self, feed: Feed) -> None:
        if not feed.cached:
            raise InputError("skipdecode follows the cache, and there is none; leave use_cache on, or use skip_forward")
        if feed.start and self.stop and (feed.start != self.stop or feed.new > 1):
            raise InputError(
                f"{feed.new} columns are fed behind column {feed.start} of {self.stop}: assisted decoding and chunked "
                "prompts do not go with skipped layers in plain generate; feed one at a time"
            )

    def _check_prompt(self, mask: object) -> None:
        if isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, -1].all()):
            raise InputError("a prompt is padded on the right, where tokens will follow; pad on the left")
