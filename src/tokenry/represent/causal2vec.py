"""Causal2Vec: a small encoder reads the text first; what it says is one token before the text of a causal decoder.

With g the mean of the encoder's states over the text, the Contextual token and the embedding are

    c = W2 gelu(W1 g + b1) + b2,    z = concat(h_C, h_EOS),

where h are the decoder's final states for [instruction, C, text, EOS] (arXiv 2507.23386). The abstract has the idea; no
code was found, and pooling, projector and layout are the usual practice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Seed
from ..core.method import Local
from ..models.anatomy import decoder_body, fingerprint
from .contextual.config import Causal2VecConfig, Context, Pooling
from .contextual.embedder import ContextEmbedder
from .contextual.files import load_encoder, read_folder
from .contextual.model import Causal2VecModel
from .contextual.splice import Pieces
from .contract import RepresentMethod

__all__ = ["Causal2Vec", "Causal2VecModel", "Pieces"]


class Causal2Vec(RepresentMethod):
    """Text embeddings of a decoder that has been told what the text is about before it reads it.

        embedder = Causal2Vec().untrained(model, tokenizer)         # with all-MiniLM-L6-v2; its projector knows nothing
        train_contrastive(SentenceTransformer(modules=[Causal2VecTransformer(embedder)]), pairs)
        embedder.save("folder")
        Causal2Vec(trained="folder").encoder(model, tokenizer).encode(texts)     # (texts, 2 * width)

    What is learned holds the decoder as it was trained; `model` must be the one that the training began with.
    """

    slug: ClassVar[str] = "causal2vec"
    title: ClassVar[str] = "Causal2Vec"
    paper: ClassVar[str] = (
        "Causal2Vec: Improving Decoder-only LLMs as Embedding Models through a Contextual Token, arXiv 2507.23386"
    )
    claim: ClassVar[str] = (
        "A token before the text that sums it up, made by a small bidirectional encoder, makes better embeddings of a "
        "causal decoder than its last token alone."
    )
    published: ClassVar[Claim | None] = Claim(
        "66.10", "mean of MTEB (English)", "Mistral-7B; 66.08 of bge-en-icl, whose inputs are longer"
    )

    trained: Annotated[Path | None, Local()] = Field(
        default=None, description="folder of a trained one; it brings the settings below"
    )
    encoder_name: Annotated[str, Local()] = Field(
        default="minilm", description="the small encoder to begin with: minilm (from its wheel), or a folder"
    )
    encoder_pooling: Literal["mean", "cls"] = Field(default="mean", description="how its states become one vector")
    projector: Literal["mlp", "linear"] = Field(default="mlp", description="what maps that to the decoder's width")
    context: Context = Field(
        default="encoder", description="what stands at the token: encoder, a constant learned vector, or no token"
    )
    context_position: Literal["after_instruction", "first"] = Field(
        default="after_instruction", description="where the token stands; a BOS token stays first"
    )
    pooling: Pooling = Field(default="context_eos", description="the states that are the embedding")
    seed: Seed = Field(default=0, description="seed of the projector's first weights")

    @model_validator(mode="after")
    def _has_token(self) -> Self:
        if self.context == "none" and self.pooling.startswith("context"):
            raise ValueError(
                f"pooling={self.pooling!r} needs the Contextual token, but context='none' leaves it out; give pooling "
                "eos or mean"
            )
        return self

    def encoder(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_length: int | None = None,
        truncate: bool = False,
    ) -> ContextEmbedder:
        """The trained one. Raises InputError without `trained`, or where it was trained on another decoder."""
        if self.trained is None:
            raise InputError(
                "Causal2Vec has to be trained before it embeds; give trained=FOLDER, or train what "
                "Causal2Vec().untrained(model, tokenizer) gives"
            )
        embedder = read_folder(self.trained)
        made_for = embedder.model.config.decoder_fingerprint
        if made_for != fingerprint(model):
            raise InputError(
                f"the Causal2Vec in {str(self.trained)!r} was trained on a decoder with weights {made_for}, not "
                f"{fingerprint(model)}; give the model that its training began with"
            )
        cast(nn.Module, embedder).to(model.device, model.dtype)
        embedder.max_seq_length, embedder.truncate = max_seq_length, truncate
        return embedder.eval()

    def untrained(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        encoder: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    ) -> ContextEmbedder:
        """To be trained: decoder and encoder are used as they are, and share their weights with it.

        Args:
            encoder: the small encoder and its tokenizer; default `encoder_name`.

        Raises:
            InputError: no causal decoder, an encoder that is none or lies on another device or in another dtype, or
                a tokenizer without EOS token.
        """
        reader, reads = load_encoder(self.encoder_name, model) if encoder is None else encoder
        config = Causal2VecConfig(
            decoder=decoder_body(model).config.to_dict(),
            encoder=reader.config.to_dict(),
            decoder_fingerprint=fingerprint(model),
            **self.model_dump(exclude={"trained", "encoder_name", "seed"}),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            made = Causal2VecModel(config, decoder_body(model), reader)
            made.fit_scale()
        return ContextEmbedder(made, tokenizer, reads)
