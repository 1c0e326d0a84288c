"""What a select method is: parameters, and the context manager they open on a model."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from transformers import PreTrainedModel

from ..core.fields import Tokens
from ..core.method import Method
from ..core.schemas import Exchanged
from .cutters.cache import CacheCutter

__all__ = ["SelectAnswer", "SelectMethod", "SelectRequest"]


class SelectRequest(Exchanged):
    """A question about a long text."""

    context: str = Field(min_length=1, description="the text, of which tokens are kept")
    question: str = Field(min_length=1, description="asked after it")
    max_new_tokens: Tokens = Field(64, description="of the answer")


class SelectAnswer(Exchanged):
    """The answer, and what was kept to give it."""

    text: str
    kept: list[int] = Field(description="tokens kept, of each layer")
    prompt_tokens: int = Field(ge=1, description="tokens there were")
    cache_bytes: int = Field(ge=0, description="size of the cache after the answer")


class SelectMethod(Method):
    """A method of the select stage.

    with CompressKV(budget=128)(model) as run:
        model.generate(...)
    run.trace  # KeepMap of the last prefill
    """

    stage: ClassVar[str] = "select"
    input: ClassVar[type[Exchanged]] = SelectRequest
    output: ClassVar[type[Exchanged]] = SelectAnswer

    def __call__(self, model: PreTrainedModel) -> CacheCutter:
        """The context manager for one model; a new one for every call."""
        raise NotImplementedError
