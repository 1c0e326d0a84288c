"""HeadProfile: which heads retrieve, and how much each layer suffers from a tiny cache. Made once per model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...core.errors import InputError
from ...core.files import explained, read_json
from ...core.outputs import write_text
from ...core.schemas import unmet

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from ...models.anatomy import shape_of

__all__ = ["HeadProfile"]


REMEDY = "make one with tokenry.select.calibrate_model(model, tokenizer)"


class HeadProfile(BaseModel):
    """A calibration result, bound to the model it was made for.

    Attributes:
        model: name of the model; with `fingerprint` (see tokenry.hooks) it says whom the profile fits.
        order: per layer, all heads, best retriever first (L, H).
        scores: the scores behind the order (L, H); empty where only the order is known.
        error: per layer, the share of the damage that a tiny cache does (L), or None when it was not measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str
    fingerprint: str | None = None
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    order: tuple[tuple[int, ...], ...]
    scores: tuple[tuple[float, ...], ...] = ()
    error: tuple[float, ...] | None = None

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(f"head profile: {unmet(error)}; {REMEDY}") from None

    def model_post_init(self, context: object) -> None:
        if len(self.order) != self.layers:
            raise InputError(f"the head order has {len(self.order)} layers, the profile {self.layers}; {REMEDY}")
        for layer, heads in enumerate(self.order):
            wrong = [h for h in heads if not 0 <= h < self.heads]
            if wrong or len(set(heads)) != len(heads) or not heads:
                what = f"head {wrong[0]}, the model has 0 to {self.heads - 1}" if wrong else "no heads or a head twice"
                raise InputError(f"layer {layer} of the head order names {what}; {REMEDY}")
        if self.scores and [len(row) for row in self.scores] != [self.heads] * self.layers:
            raise InputError(f"the scores are not {self.layers} layers of {self.heads} heads; {REMEDY}")
        if self.error is not None and len(self.error) != self.layers:
            raise InputError(f"the layer error has {len(self.error)} entries for {self.layers} layers; {REMEDY}")
        if self.error is not None and (min(self.error) < 0 or sum(self.error) <= 0):
            raise InputError(f"the layer errors must be >= 0 and not all zero; {REMEDY}")

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether the profile was made for these weights (or this name, where it has no fingerprint)."""
        from ...models.anatomy import fingerprint

        if self._shape() != shape_of(model):
            return False
        if self.fingerprint is None:
            return self.model == model.config._name_or_path
        return self.fingerprint == fingerprint(model)

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that this profile was not made for."""
        if self._shape() != shape_of(model):
            raise InputError(
                f"the head profile is for {self.model} ({self._shape()}), this model has {shape_of(model)}; {REMEDY}"
            )
        if not self.fits(model):
            raise InputError(f"the head profile was made for {self.model}, not for the weights given; {REMEDY}")

    def _shape(self) -> dict[str, int]:
        return {"layers": self.layers, "heads": self.heads, "kv_heads": self.kv_heads}

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        write_text(path, json.dumps(self.model_dump(mode="json")) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> HeadProfile:
        """Read what `save` wrote; anything else is refused."""
        with explained(f"the head profile {str(path)!r} cannot be read", REMEDY):
            values = read_json(path)
        if not isinstance(values, dict):
            raise InputError(f"the file {str(path)!r} is no head profile; {REMEDY}")
        return cls(**values)
