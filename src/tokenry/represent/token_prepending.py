"""Token Prepending: a slot before the sentence is overwritten with the state of the last token, in early layers.

In a causal model the first words of a sentence never see the later ones. With h[l] the input of layer l, p the slot
and t the last token,

    h[l][p] = h[l][t]    for start_layer <= l < exit_layer,

so every word of the next layer can attend to a summary of the whole sentence (section 3 of arXiv 2412.11556).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import ClassVar, Literal, Self, cast

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Layer, Layers, Seed
from ..hooks.holding import hold, hooked
from ..hooks.last_states import last_tokens
from ..hooks.residual import Feed, edit_inputs, on_feed
from ..models.anatomy import decoder_layers, effective_weight, reads_ids, unwrapped, vocabulary_size
from ..models.masks import sees_both_sides
from .contract import RepresentMethod
from .text.prompt_embedder import PromptEmbedder, read_prompt

__all__ = ["Prepending", "TokenPrepending"]


class TokenPrepending(RepresentMethod):
    """Sentence embeddings in which early words know the later ones.

        TokenPrepending(exit_layer=2).encoder(model, tokenizer).encode(sentences)     # (sentences, width)

        with TokenPrepending(exit_layer=2)(model) as run:      # ids of your own, with run.slot_token_id in each row
            states = model.get_decoder()(ids).last_hidden_state[:, -1]

    The prompt, the output layer and the BOS token concern the encoder only.
    """

    slug: ClassVar[str] = "token-prepending"
    title: ClassVar[str] = "Token Prepending"
    paper: ClassVar[str] = (
        "Token Prepending: A Training-Free Approach for Eliciting Better Sentence Embeddings from LLMs, "
        "arXiv 2412.11556"
    )
    claim: ClassVar[str] = (
        "Overwriting a slot before the sentence with the state of the last token, in early layers, gives better "
        "sentence embeddings without training."
    )
    published: ClassVar[Claim] = Claim(
        "+7.16", "Spearman x 100 over the same prompt", "Llama-2-7B, PromptEOL, mean of seven STS sets"
    )

    start_layer: Layer = Field(default=1, description="first layer before which the slot is overwritten")
    exit_layer: Layers = Field(
        default=2, description="first layer before which it no longer is; above start_layer, 7 suits 7B models"
    )
    output_layer: int = Field(
        default=-1,
        ge=-1024,
        le=1024,
        description="layers run before the embedding is read; -1: all, and the final norm",
    )
    prompt: str = Field(
        default="prompteol", description="prompteol, cot, ke, metaeol, or a template with one {slot} and one {text}"
    )
    add_bos: bool | None = Field(default=None, description="put the BOS token first; none: as the tokenizer does")
    slot_init: Literal["normal", "zeros", "mean"] = Field(
        default="normal", description="embedding of the slot: drawn from N(0, 1), zeros, or the mean of all embeddings"
    )
    overwrite: bool = Field(default=True, description="false leaves the slot alone: the control")
    seed: Seed = Field(default=0, description="seed of the slot's embedding")

    @field_validator("prompt")
    @classmethod
    def _reads(cls, prompt: str) -> str:
        read_prompt(prompt)
        return prompt

    @model_validator(mode="after")
    def _has_layers(self) -> Self:
        if self.start_layer >= self.exit_layer:
            raise ValueError(
                f"start_layer={self.start_layer} must be below exit_layer={self.exit_layer}; "
                f"raise exit_layer to {self.start_layer + 1} or more"
            )
        return self

    def __call__(self, model: PreTrainedModel, slot_token_id: int | None = None) -> Prepending:
        """The context manager for one model.

        Args:
            slot_token_id: the id that stands for the slot; default the first id behind the model's vocabulary, which
                no text can contain.

        Raises:
            InputError: start_layer beyond the model's layers, or a model that is no causal decoder. Inside the
                context, forwards are refused that have a row without exactly one slot, a slot that is the last token,
                a filled cache, inputs_embeds, or a mask that is not 2-D.
        """
        layers = decoder_layers(model)
        if model.config.is_encoder_decoder or sees_both_sides(model):
            raise InputError(f"{type(model).__name__} is bidirectional, but TP needs causal attention; use a decoder")
        if reads_ids(model):
            raise InputError(
                f"the layers of {type(model).__name__} read token ids, and the slot is none; use a model whose layers "
                "read embeddings alone"
            )
        if self.start_layer >= len(layers):
            raise InputError(
                f"start_layer={self.start_layer} does not exist; this model has layers 0 to {len(layers) - 1}"
            )
        edited = range(self.start_layer, min(self.exit_layer, len(layers)) if self.overwrite else self.start_layer)
        embedding = model.get_input_embeddings()
        slot = vocabulary_size(model) if slot_token_id is None else slot_token_id
        return Prepending(model, slot, edited, self._vector(embedding))

    def _vector(self, embedding: nn.Module) -> Tensor:
        """The slot's embedding, scaled as the embedding scales its rows (Gemma)."""
        scale = float(getattr(unwrapped(embedding), "embed_scale", 1.0))
        width = cast(int, unwrapped(embedding).embedding_dim)
        if self.slot_init == "mean":
            return scale * effective_weight(embedding, "the embedding").float().mean(0)
        if self.slot_init == "zeros":
            return torch.zeros(width)
        return scale * torch.randn(width, generator=torch.Generator().manual_seed(self.seed))

    def encoder(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_seq_length: int | None = None,
        truncate: bool = False,
    ) -> PromptEmbedder:
        """An `nn.Module` with `encode(sentences)`. Raises InputError as `PromptEmbedder` does."""
        return PromptEmbedder(
            model,
            tokenizer,
            prompt=self.prompt,
            token_prepending=self,
            output_layer=self.output_layer,
            add_bos=self.add_bos,
            max_seq_length=max_seq_length,
            truncate=truncate,
        )


class Prepending:
    """Context manager: rows that hold the slot token once get it overwritten in every forward of the model.

    Works with padding on either side; the last token comes from the attention mask. The slot's own vector is put on
    the output of the embedding, so its id need not be in the vocabulary.

    Args:
        slot_token_id: the id that stands for the slot.
        layers: the layers before which the slot is overwritten.
        vector: (width,) embedding of the slot.
    """

    def __init__(self, model: PreTrainedModel, slot_token_id: int, layers: range, vector: Tensor) -> None:
        self.model, self.slot_token_id, self.layers, self.vector = model, slot_token_id, layers, vector
        self._is_slot: Tensor | None = None  # from the start of a forward to its embedding
        self._slot = self._last = torch.empty(0)
        self._stack: ExitStack | None = None

    def __enter__(self) -> Self:
        if self._stack is not None:
            raise InputError("this context of token prepending is open already; leave it first, or make another one")
        blocks, embedding = decoder_layers(self.model), self.model.get_input_embeddings()
        self._is_slot = None
        with ExitStack() as stack:  # whatever was opened is closed again when a later step fails
            stack.enter_context(hold(self.model))
            stack.enter_context(on_feed(self.model, self._find_slot))
            stack.enter_context(edit_inputs(self.model, {embedding: self._known_ids}))
            stack.enter_context(hooked(embedding, self._put_vector))
            stack.enter_context(edit_inputs(self.model, {blocks[layer]: self._overwrite for layer in self.layers}))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        stack, self._stack = cast(ExitStack, self._stack), None
        stack.close()

    def _find_slot(self, feed: Feed) -> None:
        if feed.ids is None:
            raise InputError("token prepending finds its slot in input_ids; do not pass inputs_embeds")
        if feed.start > 0:
            raise InputError(
                f"token prepending reads whole sequences, but past_key_values holds {feed.start} tokens; "
                "call the model without a cache"
            )
        mask = torch.ones_like(feed.ids) if feed.mask is None else feed.mask
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise InputError("token prepending reads a 2-D attention_mask (batch, tokens); do not pass a 4-D one")
        real = mask.bool()
        self._is_slot = (feed.ids == self.slot_token_id) & real
        for row, count in enumerate(self._is_slot.sum(1).tolist()):
            if count != 1:
                raise InputError(
                    f"the slot token {self.slot_token_id} must occur exactly once per row, row {row} has {count}; "
                    "put it before the sentence"
                )
        self._slot = self._is_slot.long().argmax(1)
        self._last = last_tokens(real)
        late = self._slot >= self._last
        if bool(late.any()):
            row = int(late.long().argmax())
            raise InputError(f"the slot of row {row} is its last token; put the slot before the sentence")

    def _known_ids(self, ids: Tensor) -> Tensor:
        return ids.masked_fill(ids == self.slot_token_id, 0)

    def _put_vector(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        is_slot, self._is_slot = self._is_slot, None
        if is_slot is None:
            raise InputError(
                f"{type(self.model).__name__} embeds its tokens before it calls its language model, where the slot is "
                "found; use a model of text alone"
            )
        if output.shape[:2] != is_slot.shape:
            raise InputError(
                f"the embeddings of {type(self.model).__name__} have shape {tuple(output.shape)}, not (batch, time, "
                "width); use another model"
            )
        is_slot = is_slot.to(output.device)
        return torch.where(is_slot[..., None], self.vector.to(output.device, output.dtype), output)

    def _overwrite(self, hidden: Tensor) -> Tensor:
        if hidden.dim() != 3:
            raise InputError(
                f"the layers of {type(self.model).__name__} take states of shape {tuple(hidden.shape)}; use a model "
                "with one residual stream"
            )
        rows = torch.arange(len(hidden), device=hidden.device)
        slot, last = self._slot.to(hidden.device), self._last.to(hidden.device)
        return hidden.index_put((rows, slot), hidden[rows, last])
