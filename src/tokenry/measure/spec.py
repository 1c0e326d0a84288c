"""What a comparison is made from, in a form that another process or machine can make the same one from."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..core.method import Method
from ..models.load import load
from .compare import made_of
from .experiment import Declaration, Experiment

__all__ = ["Spec"]


@dataclass(frozen=True)
class Spec:
    """An experiment as the command line asks for it.

    Attributes:
        module: declares it.
        model: its name; None for the one that the experiment declares.
        method: settings from outside; None for the experiment's own.
    """

    module: str
    model: str | None = None
    method: Method | None = None
    samples: int | None = None
    seeds: Sequence[int] | None = None
    quick: bool = False
    dtype: str | None = None
    device: str | None = None
    trust_remote_code: bool = False

    @property
    def declared(self) -> Declaration:
        return importlib.import_module(self.module).build

    @property
    def model_name(self) -> str:
        return self.declared.model if self.model is None else self.model

    def build(self) -> tuple[Experiment, dict[str, Any]]:
        """Load the model and build the experiment; with it what identifies the model, for `compare`."""
        model, tokenizer = load(self.model_name, self.dtype, self.device, self.trust_remote_code)
        # Before anything is built on the model: an adapter adds weights to it.
        about = {"model": self.model_name, "dtype": str(model.dtype), **made_of(model, tokenizer)}
        options = {"samples": self.samples, "seeds": self.seeds, "method": self.method, "quick": self.quick}
        return self.declared(model, tokenizer, **options), about
