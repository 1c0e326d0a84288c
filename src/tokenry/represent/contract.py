"""What a represent method is: parameters, and the encoder they make of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.fields import Batch, Tokens
from ..core.method import Method
from ..core.progress import Progress
from ..core.schemas import Exchanged
from ..models.load import Loaded
from .text.prompt_embedder import PromptEmbedder

__all__ = ["Encoder", "RepresentAnswer", "RepresentMethod", "RepresentRequest", "encoder_of"]


class RepresentRequest(Exchanged):
    """Texts to embed."""

    texts: list[str] = Field(min_length=1)
    batch_size: Batch = Field(default=16, description="texts at a time")
    max_seq_length: Tokens | None = Field(
        default=None, description="tokens of a text with its prompt; none: the model's"
    )
    truncate: bool = Field(default=False, description="cut longer texts at their end instead of refusing them")


class RepresentAnswer(Exchanged):
    """A vector for each text, in the order given."""

    embeddings: list[list[float]]


class Encoder(Protocol):
    """An `nn.Module`, or a module of sentence-transformers, that embeds texts."""

    truncate: bool

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of a text at most, prompt included."""
        ...

    @max_seq_length.setter
    def max_seq_length(self, tokens: int | None) -> None: ...

    def encode(self, sentences: Sequence[str], batch_size: int = 16, progress: Progress | None = None) -> Tensor:
        """(sentences, width), float32 on the CPU, in the order given. `progress` gets (done, all) after a batch."""
        ...


class RepresentMethod(Method):
    """A method of the represent stage.

    TokenPrepending(exit_layer=2).encoder(model, tokenizer).encode(sentences)  # (sentences, width)
    """

    stage: ClassVar[str] = "represent"
    input: ClassVar[type[Exchanged]] = RepresentRequest
    output: ClassVar[type[Exchanged]] = RepresentAnswer

    def encoder(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_length: int | None = None,
        truncate: bool = False,
    ) -> Encoder:
        """The encoder for one model.

        Args:
            max_seq_length: tokens of a text at most, prompt included; None is what the model takes.
            truncate: cut a longer text at its end; else it is refused.
        """
        raise NotImplementedError


def encoder_of(method: RepresentMethod | None, loaded: Loaded) -> Encoder:
    """The encoder of a method, or the neutral one: the plain prompt, read at its last token."""
    return PromptEmbedder(*loaded) if method is None else method.encoder(*loaded)
