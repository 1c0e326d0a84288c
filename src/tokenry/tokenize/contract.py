"""What a tokenize method is: parameters, and the tokenizer that they make of texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from pydantic import Field
from transformers import PreTrainedTokenizerFast

from ..core.method import Method
from ..core.schemas import Exchanged

__all__ = ["TokenizeAnswer", "TokenizeMethod", "TokenizeRequest"]


class TokenizeRequest(Exchanged):
    """What a tokenizer is trained on, and where it goes."""

    texts: list[str] = Field(min_length=1, description="documents")
    folder: str = Field(description="folder to save the tokenizer in")


class TokenizeAnswer(Exchanged):
    """What was trained."""

    folder: str = Field(description="where `AutoTokenizer.from_pretrained` finds it")
    vocabulary: int = Field(ge=1, description="entries of the vocabulary")
    files: int = Field(ge=1, description="documents that were read")


class TokenizeMethod(Method):
    """A method of the tokenize stage.

    tokenizer = KL3M(vocab_size=8192).train(texts)
    tokenizer.save_pretrained("folder")
    """

    stage: ClassVar[str] = "tokenize"
    input: ClassVar[type[Exchanged]] = TokenizeRequest
    output: ClassVar[type[Exchanged]] = TokenizeAnswer

    def train(self, texts: Iterable[str]) -> PreTrainedTokenizerFast:
        """A tokenizer made from documents, which are read once, so that a generator will do.

        Raises:
            InputError: no text at all, or a document that is not text.
        """
        raise NotImplementedError
