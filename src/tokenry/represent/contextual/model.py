"""The decoder that is told what the encoder makes of the text."""

from __future__ import annotations

from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...core.errors import InputError
from ...hooks.last_states import last_tokens
from ...models.anatomy import decoder_layers, reads_ids
from ...models.batch import position_arguments
from ...models.masks import sees_both_sides
from .config import Causal2VecConfig
from .splice import Pieces, context_token_inputs, masked_mean

__all__ = ["Causal2VecModel"]


class Causal2VecModel(PreTrainedModel):
    """A decoder, a small encoder, and the projector between them.

    Args:
        decoder, encoder: base models, without heads; default new ones with random weights.

    Raises:
        InputError: as `Causal2Vec.untrained`, or models of other widths than `config` says.
    """

    config_class = Causal2VecConfig
    base_model_prefix = "causal2vec"
    _keys_to_ignore_on_load_missing: ClassVar = [r"encoder\.pooler\."]  # of BERT, which nothing here reads
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"encoder\.pooler\."]

    def __init__(
        self,
        config: Causal2VecConfig,
        decoder: PreTrainedModel | None = None,
        encoder: PreTrainedModel | None = None,
    ) -> None:
        super().__init__(config)
        self.decoder, self.encoder = config.models(decoder, encoder)
        check_models(self.decoder, self.encoder)
        inner, width = self.encoder.config.hidden_size, self.decoder.config.hidden_size
        if config.projector == "linear":
            self.projector: nn.Module = nn.Linear(inner, width)
        else:
            self.projector = nn.Sequential(nn.Linear(inner, width), nn.GELU(), nn.Linear(width, width))
        self.constant = nn.Parameter(torch.randn(width))
        self.projector.to(self.decoder.device, self.decoder.dtype)
        self.constant.data = self.constant.data.to(self.decoder.device, self.decoder.dtype)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The parts bring their own weights; torch's are good for the projector."""

    @torch.no_grad()
    def fit_scale(self) -> None:
        """Make the Contextual token as long as a token's embedding is on average: else training begins unstable."""
        ids = torch.randint(self.encoder.config.vocab_size, (64, 4), device=self.device)
        tokens = self.decoder.get_input_embeddings()(torch.arange(self.decoder.config.vocab_size, device=self.device))
        length = tokens.float().norm(dim=-1).mean()
        last = self.projector if isinstance(self.projector, nn.Linear) else cast(nn.Sequential, self.projector)[-1]
        cast(nn.Linear, last).bias.zero_()
        found = self.projector(self.summary(ids, torch.ones_like(ids))).float().norm(dim=-1).mean()
        cast(nn.Linear, last).weight.mul_(length / found)
        self.constant.mul_(length / self.constant.float().norm())

    def summary(self, encoder_input_ids: Tensor, encoder_attention_mask: Tensor) -> Tensor:
        """(batch, encoder width): the encoder's states as one vector, which is all that the decoder is told."""
        states = self.encoder(encoder_input_ids, attention_mask=encoder_attention_mask).last_hidden_state
        if self.config.encoder_pooling == "mean":
            return masked_mean(states, encoder_attention_mask)
        return states[torch.arange(len(states)), encoder_attention_mask.long().argmax(1)]

    def context_token(self, encoder_input_ids: Tensor, encoder_attention_mask: Tensor) -> Tensor:
        """(batch, width): what stands at the Contextual token."""
        if self.config.context == "constant":
            return self.constant.expand(len(encoder_input_ids), -1)
        return self.projector(self.summary(encoder_input_ids, encoder_attention_mask))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        encoder_input_ids: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        context_index: Tensor | None = None,
        context_token: Tensor | None = None,
    ) -> Pieces:
        """Embeddings, and what they are made of.

        Args:
            input_ids, attention_mask: (batch, time) for the decoder, EOS included, padded on either side.
            encoder_input_ids, encoder_attention_mask: (batch, time) of the same texts for the encoder, by its own
                tokenizer.
            context_index: (batch,) tokens of the row before the Contextual token; default 0.
            context_token: (batch, width) to stand there, instead of what the encoder says.

        Raises:
            InputError: no ids for an encoder that is needed, or a context_index outside a row.
        """
        embeds, mask, at = self.decoder.get_input_embeddings()(input_ids), attention_mask, None
        if self.config.context != "none":
            if context_token is None and (encoder_input_ids is None or encoder_attention_mask is None):
                raise InputError("the encoder gets no ids; give encoder_input_ids and encoder_attention_mask")
            if context_token is None:
                context_token = self.context_token(
                    cast(Tensor, encoder_input_ids), cast(Tensor, encoder_attention_mask)
                )
            index = torch.zeros_like(input_ids[:, 0]) if context_index is None else context_index
            embeds, mask, at = context_token_inputs(embeds, context_token, index, attention_mask)
        states = self.decoder(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False, **position_arguments(self.decoder, mask)
        ).last_hidden_state
        rows = torch.arange(len(states), device=states.device)
        ends = states[rows, last_tokens(mask)]
        front = ends.new_zeros(0) if at is None else states[rows, at]
        ways = {"eos": lambda: ends, "context": lambda: front, "mean": lambda: masked_mean(states, mask)}
        pooled = ways.get(self.config.pooling, lambda: torch.cat([front, ends], -1))()
        embedding = nn.functional.normalize(pooled.float(), dim=-1)
        return Pieces(embedding=embedding, context_state=front, eos_state=ends, context_token=context_token)


def check_models(decoder: PreTrainedModel, encoder: PreTrainedModel) -> None:
    """Refuse what cannot be put together."""
    decoder_layers(decoder)
    if decoder.config.is_encoder_decoder or sees_both_sides(decoder):
        raise InputError(f"{type(decoder).__name__} sees both sides; Causal2Vec needs a causal decoder")
    if reads_ids(decoder):
        raise InputError(
            f"the layers of {type(decoder).__name__} read token ids, which the Contextual token has none of; give a "
            "decoder that reads embeddings alone"
        )
    if not sees_both_sides(encoder):
        raise InputError(f"{type(encoder).__name__} is causal; give an encoder that sees both sides, such as BERT")
    for what in ("device", "dtype"):
        mine, other = getattr(decoder, what), getattr(encoder, what)
        if mine != other:
            raise InputError(f"the decoder has {what} {mine}, the encoder {other}; bring both to the same {what}")
