"""What a select method is: parameters, and the context manager they open on a model."""

from __future__ import annotations

from typing import ClassVar

from transformers import PreTrainedModel

from ..core.method import Method
from .cutters.cache import CacheCutter

__all__ = ["SelectMethod"]


class SelectMethod(Method):
    """A method of the select stage.

    with CompressKV(budget=128)(model) as run:
        model.generate(...)
    run.trace  # KeepMap of the last prefill
    """

    stage: ClassVar[str] = "select"

    def __call__(self, model: PreTrainedModel) -> CacheCutter:
        """The context manager for one model; a new one for every call."""
        raise NotImplementedError
