"""What is stored for one project: the weights that were trained, and for which model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from ...core.artifact import Artifact, Folder, Header, MadeFor
from ...core.errors import InputError
from ...models.anatomy import fingerprint
from .ways import Tuning, Way, personalize, trained

__all__ = ["ProjectDelta", "load_delta"]


class DeltaHeader(Header):
    """What a stored delta says of itself."""

    way: Way
    last_n_blocks: int = Field(ge=1)
    virtual_tokens: int = Field(ge=1)
    rank: int = Field(ge=1)
    made_for: MadeFor


class ProjectDelta(Artifact):
    """The trained weights of one project.

    Attributes:
        tuning: in which way they were trained.
        weights: {name in the tuned model: tensor}.
        made_for: name and fingerprint of the model as it was before.
    """

    kind = "delta"
    layout = Folder("delta.safetensors", "delta.json")
    fields: ClassVar[type[Header]] = DeltaHeader
    remedy = "give a folder that `tokenry train --method personalized-code` has written"

    def __init__(self, tuning: Tuning, weights: dict[str, Tensor], made_for: dict[str, Any]) -> None:
        self.tuning, self.weights, self.made_for = tuning, weights, made_for

    @classmethod
    def of(cls, model: PreTrainedModel, tuning: Tuning, made_for: dict[str, Any]) -> ProjectDelta:
        """The weights of a tuned model as they are now; copies on the CPU."""
        weights = {name: weight.detach().cpu().clone() for name, weight in trained(model).items()}
        return cls(tuning, weights, made_for)

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.weights, {**self.tuning._asdict(), "made_for": self.made_for}

    @classmethod
    def restored(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> ProjectDelta:
        if not tensors:
            raise ValueError("it has no weights")
        return cls(Tuning(*(header[name] for name in Tuning._fields)), tensors, header["made_for"])

    @torch.no_grad()
    def apply(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model tuned to the project: itself with other weights, or a `peft.PeftModel` around it.

        Raises:
            InputError: another model than it was made for.
        """
        self.check_made_for(fingerprint(model))
        tuned = personalize(model, self.tuning)
        weights = trained(tuned)
        if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in self.weights.items()}:
            raise InputError(f"the weights of the {self.kind} are not those of way={self.tuning.way}; {self.remedy}")
        for name, weight in weights.items():
            weight.copy_(self.weights[name])
        return tuned


def load_delta(model: PreTrainedModel, path: str | Path) -> PreTrainedModel:
    """The model tuned to the project whose delta lies in a folder; see `ProjectDelta.apply`."""
    return cast(ProjectDelta, ProjectDelta.load(path)).apply(model)
