"""CompressKV: a few heads that look at content decide which prompt tokens the cache keeps, layer by layer.

Offline, once per model, `calibrate_model` (heads/calibrate.py) ranks the heads of each layer with needle prompts and
measures how much a tiny cache changes each layer's attention output. At run time nothing is trained or looked up but
the resulting `HeadProfile`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from ..core.artifact import ArtifactField
from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Block, Count, Multiple, Seed, Tokens
from ..models.anatomy import full_attention_layers, shape_of
from .contract import SelectMethod
from .cutters.cache import CacheCutter
from .heads.profile import HeadProfile, shipped_profile
from .keep.keep_map import LayerView
from .keep.topk import allocate_layer_budgets, pool_window

__all__ = ["CompressKV"]


class CompressKV(SelectMethod):
    """Keep `budget` cache entries per layer (on average), chosen by each layer's semantic retrieval heads.

        with CompressKV(budget=128)(model):
            model.generate(**inputs)

    `min_tokens` is 12 by default, which suits small models and budgets of 24 to 128. The paper uses 32, with budgets
    from 128 to 2048. Layers for which the prompt is not longer than their budget keep everything, so short prompts
    give exactly the plain model's output.
    """

    slug: ClassVar[str] = "compresskv"
    title: ClassVar[str] = "CompressKV"
    paper: ClassVar[str] = (
        "CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before Generation, arXiv 2508.02401"
    )
    claim: ClassVar[str] = (
        "Letting only semantic retrieval heads vote, with a budget for each layer, keeps more of the answer at the "
        "same cache size than letting all heads vote."
    )
    published: ClassVar[Claim] = Claim(
        "46.71", "LongBench mean at 256 entries (full 49.08, SnapKV 45.21)", "Llama-3.1-8B-Instruct, 16 sets"
    )

    profile: ArtifactField[HeadProfile] | None = Field(
        default=None,
        description="file of a head profile made for the model, or in Python the profile itself; the embedded model "
        "brings its own",
    )
    budget: int = Field(
        default=256, ge=2, le=2**20, description="cache entries per layer, mean over layers; more than the window"
    )
    window: Tokens = Field(default=8, description="newest prompt tokens, which vote and are always kept")
    kernel: Block = Field(default=5, description="width of the average over neighboring tokens; odd")
    top_heads: Count = Field(default=4, description="voting heads per layer; at most the model's heads")
    adaptive: bool = Field(default=True, description="give layers that suffer more from a short cache a larger budget")
    min_tokens: int = Field(
        default=12, ge=2, le=2**20, description="smallest layer budget; above the window, at most the budget"
    )
    max_factor: Multiple = Field(default=3.0, description="largest layer budget, as a multiple of the budget")
    heads: Literal["retrieval", "random", "lowest", "all"] = Field(
        default="retrieval", description="which heads vote; the others are controls"
    )
    seed: Seed = Field(default=0, description="seed of the random heads")

    @model_validator(mode="after")
    def _fits_together(self) -> CompressKV:
        if self.budget <= self.window:
            raise ValueError(f"budget={self.budget} must be above window={self.window}; raise it or shorten the window")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} is even; give an odd number such as {self.kernel + 1}")
        if self.adaptive and not self.window < self.min_tokens <= self.budget:
            raise ValueError(
                f"min_tokens={self.min_tokens} must be above window={self.window} and at most budget={self.budget}; "
                f"give a number in between or adaptive=false"
            )
        return self

    def __call__(self, model: PreTrainedModel) -> CacheCutter:
        """The context manager that compresses every prefill of `model`; its `.trace` is the last `KeepMap`.

        Raises:
            InputError: no fitting profile, too many heads, a profile without errors when adaptive, a model whose
                attention or cache cannot be cut, right-padded prompts (at prefill).
        """
        layers = full_attention_layers(model)
        profile = self._profile_for(model)
        vote = HeadVote(self._choose_heads(model, layers, profile), self.window, self.kernel)
        return CacheCutter(model, vote, self._budgets(layers, profile), protect_last=self.window)

    def _profile_for(self, model: PreTrainedModel) -> HeadProfile | None:
        if not self.adaptive and self.heads in ("all", "random"):
            return None  # nothing in it is used
        if self.profile is not None:
            self.profile.check(model)
            return self.profile
        shipped = shipped_profile()
        if not shipped.fits(model):
            raise InputError(
                f"there is no head profile for {model.config._name_or_path or type(model).__name__}; make one with "
                "tokenry.select.calibrate_model(model, tokenizer) and give it as profile=..."
            )
        return shipped

    def _choose_heads(
        self, model: PreTrainedModel, layers: list[int], profile: HeadProfile | None
    ) -> dict[int, Sequence[int]]:
        count, top = shape_of(model)["heads"], self.top_heads
        if self.heads == "all":
            return {layer: range(count) for layer in layers}
        if top > count:
            raise InputError(f"top_heads={top} is more than the model's {count} heads; give 1 to {count}")
        if self.heads == "random":
            return {layer: random.Random(f"{self.seed} {layer}").sample(range(count), top) for layer in layers}
        assert profile is not None  # it is, as its heads are wanted
        short = [layer for layer in layers if len(profile.order[layer]) < top]
        if short:
            raise InputError(
                f"the head profile names {len(profile.order[short[0]])} heads in layer {short[0]}, top_heads={top}; "
                "lower top_heads or make a new profile"
            )
        part = slice(None, top) if self.heads == "retrieval" else slice(-top, None)
        return {layer: profile.order[layer][part] for layer in layers}

    def _budgets(self, layers: list[int], profile: HeadProfile | None) -> dict[int, int]:
        if not self.adaptive:
            return dict.fromkeys(layers, self.budget)
        assert profile is not None  # it is, as its errors are wanted
        if profile.error is None:
            raise InputError(
                "the head profile has no layer errors; measure them with layer_eviction_error or give adaptive=False"
            )
        error = [profile.error[layer] for layer in layers]
        most = int(self.max_factor * self.budget)
        return dict(zip(layers, allocate_layer_budgets(error, self.budget * len(layers), self.min_tokens, most)))


@dataclass(frozen=True)
class HeadVote:
    """What the newest `window` tokens look at, as seen by chosen heads of each layer."""

    heads: dict[int, Sequence[int]]
    window: int
    kernel: int
    reads_attention: bool = field(default=True, init=False)

    def score(self, view: LayerView) -> Tensor:
        rows = view.attention(self.window, self.heads[view.layer])
        return pad(pool_window(rows, self.kernel), (0, self.window))
