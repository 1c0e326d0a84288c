"""HeadProfile: which heads retrieve, and how much each layer suffers from a tiny cache. Made once per model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...core.artifact import Artifact, JsonFile
from ...core.errors import InputError
from ...core.schemas import unmet
from ...models.anatomy import fingerprint, shape_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["HeadProfile", "shipped_profile"]

SHIPPED = Path(__file__).parent / "data" / "smollm2.json"
REMEDY = "make one with tokenry.select.calibrate_model(model, tokenizer)"


class HeadProfile(Artifact, BaseModel):
    """A calibration result, bound to the model it was made for.

    Attributes:
        model: name of the model; with `fingerprint` (see tokenry.models.anatomy) it says whom the profile fits.
        order: per layer, all heads, best retriever first (L, H).
        scores: the scores behind the order (L, H); empty where only the order is known.
        error: per layer, the share of the damage that a tiny cache does (L), or None when it was not measured.
    """

    kind: ClassVar[str] = "head profile"
    layout: ClassVar[JsonFile] = JsonFile()
    remedy: ClassVar[str] = REMEDY
    unread: ClassVar[str] = "the {kind} {path!r} cannot be read"
    foreign: ClassVar[str] = "the file {path!r} is no {kind}"
    named: ClassVar[str] = "the {kind} {path!r}"
    stranger: ClassVar[str] = f"the {{kind}} was made for {{model}}, not for the weights given; {REMEDY}"

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

    @property
    def made_for(self) -> dict[str, str]:
        """The weights, or the name of the model where they are not known."""
        return {"model": self.model, "fingerprint": self.model if self.fingerprint is None else self.fingerprint}

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether the profile was made for these weights (or this name, where it has no fingerprint)."""
        return self._shape() == shape_of(model) and self._found(model) == self.made_for["fingerprint"]

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that this profile was not made for."""
        if self._shape() != shape_of(model):
            raise InputError(
                f"the head profile is for {self.model} ({self._shape()}), this model has {shape_of(model)}; {REMEDY}"
            )
        self.check_made_for(self._found(model))

    def _found(self, model: PreTrainedModel) -> str:
        return model.config._name_or_path if self.fingerprint is None else fingerprint(model)

    def _shape(self) -> dict[str, int]:
        return {"layers": self.layers, "heads": self.heads, "kv_heads": self.kv_heads}

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, self.model_dump(mode="json")

    @classmethod
    def restored(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> HeadProfile:
        return cls(**{name: value for name, value in header.items() if name != "format"})


def shipped_profile() -> HeadProfile:
    """The profile of the embedded SmolLM2-135M-Instruct, made by calibrate.py."""
    return HeadProfile.load(SHIPPED)
