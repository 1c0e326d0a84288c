"""A token value model: after every token, the probability that the text which goes on from there ends right.

Paper: Token-Supervised Value Models for Enhancing Mathematical Problem-Solving Capabilities of Large Language Models,
arXiv 2407.12863. `tokenry.train.TVMTraining` trains it, `tokenry.judge.TVM` ranks whole solutions with it and
`tokenry.decode.TVMSearch` looks for one.
"""

from __future__ import annotations

import inspect
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import BeforeValidator, InstanceOf, PlainSerializer, WithJsonSchema
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.generic import ModelOutput

from ..core.errors import InputError
from ..core.files import explained, read_json
from ..core.method import Local
from ..core.tensors import tensor_file
from ..models.anatomy import fingerprint
from ..models.batch import position_ids as positions_of
from ..models.masks import sees_both_sides
from .dead_end_values import check_sizes, vocabulary_hash

__all__ = ["TokenValueConfig", "TokenValueField", "TokenValueModel", "TokenValuesOutput"]

REMEDY = "give a folder written by TokenValueModel.save_pretrained; `tokenry train --method tvm` makes one"


class TokenValueConfig(PreTrainedConfig):
    """The config of the backbone, and whose token ids it reads."""

    model_type = "token_values"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012  # pyright: ignore[reportAssignmentType]  # as in transformers

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    vocabulary: str | None = None  # hash of the tokenizer's

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        super().__post_init__(**kwargs)


UNSET: Any = None  # a ModelOutput wants None as default of its fields


@dataclass
class TokenValuesOutput(ModelOutput):
    """`logits` (batch, time, 1), float32: the value is their sigmoid."""

    logits: Tensor = UNSET


class TokenValueModel(PreTrainedModel, GenerationMixin):
    """A causal backbone with a scalar head: value_k = sigmoid(w . h_k + b), h_k the last hidden state at token k.

    It is saved, loaded and pushed like any model of transformers. `GenerationMixin` is there for what it knows of
    caches: a search reads with one. The head computes in float32, whatever the backbone does.

    value_model = TokenValueModel.from_language_model(model, tokenizer)
    """

    config_class = TokenValueConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    config: TokenValueConfig

    def __init__(self, config: TokenValueConfig) -> None:
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self.head = nn.Linear(config.get_text_config().hidden_size, 1)
        self.takes_positions = "position_ids" in inspect.signature(self.backbone.forward).parameters
        self.post_init()

    @classmethod
    def from_language_model(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TokenValueModel:
        """A value model that begins as a copy of a language model, and with the value 0.5 everywhere.

        Raises:
            InputError: a model that reads on both sides, has an encoder, or adapters that are not merged.
        """
        if hasattr(model, "get_base_model"):
            raise InputError("the model has adapters, which are not copied with it; call merge_and_unload() first")
        if model.config.is_encoder_decoder or sees_both_sides(model):
            raise InputError(
                f"{type(model).__name__} is bidirectional, but a value must not see what follows; use a decoder"
            )
        body = cast(PreTrainedModel, model.base_model)
        made = cls(TokenValueConfig(text_config=deepcopy(body.config), vocabulary=vocabulary_hash(tokenizer)))
        made.backbone.load_state_dict(body.state_dict())
        nn.init.zeros_(made.head.weight)
        nn.init.zeros_(made.head.bias)
        made.backbone.to(body.dtype)
        return cast(TokenValueModel, cast(nn.Module, made).to(body.device))

    @classmethod
    def opened(cls, value: Any) -> TokenValueModel:
        """The model that lies in a folder, in eval mode; one that is open already comes back as it is.

        Raises:
            InputError: no such folder, another model, or a broken one.
        """
        if isinstance(value, TokenValueModel):
            return value
        if not isinstance(value, str | Path):
            raise InputError(f"{type(value).__name__} is no token value model; {REMEDY}")
        words, further = (
            f"the folder {str(value)!r} holds no token value model",
            (StrictDataclassError, SafetensorError),
        )
        with explained(words, REMEDY, *further):
            _check_folder(Path(value))
            opened: Any = cls.from_pretrained(value, output_loading_info=True, local_files_only=True)
            model, info = opened
            for name in sorted(info["missing_keys"]):
                raise ValueError(f"the tensor {name!r} is missing")
            for name, weight in model.named_parameters():
                if not bool(weight.isfinite().all()):
                    raise ValueError(f"the tensor {name!r} has numbers that are not finite")
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> TokenValuesOutput:
        """Logits of the values after each of ids (batch, time), or of the last `logits_to_keep`.

        Without positions, those of each row count its own tokens, so that padding on either side changes nothing.
        """
        if position_ids is None and attention_mask is not None and past_key_values is None:
            position_ids = positions_of(attention_mask)
        places = {"position_ids": position_ids} if self.takes_positions else {}
        hidden = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **places,
        ).last_hidden_state
        states = hidden[:, -logits_to_keep:].float()  # of 0 that is all
        return TokenValuesOutput(F.linear(states, self.head.weight.float(), self.head.bias.float()))

    @torch.no_grad()
    def score(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Values (batch, time) in [0, 1] after each of ids (batch, time), padded on either side."""
        return self(input_ids, attention_mask).logits[..., 0].sigmoid()

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer with another vocabulary: its ids would be other tokens here."""
        found = vocabulary_hash(tokenizer)
        if self.config.vocabulary not in (None, found):
            raise InputError(
                f"the value model reads the vocabulary {self.config.vocabulary}, this tokenizer has {found} "
                f"({len(tokenizer)} tokens); use the tokenizer it was trained with, or train one for this model"
            )


def _check_folder(folder: Path) -> None:
    """Refuse a folder of another model, and absurd sizes, before a model is made of it.

    Raises:
        ValueError: what is wrong.
    """
    config = read_json(folder / "config.json")
    if config["model_type"] != TokenValueConfig.model_type:
        raise ValueError(f"its model is of the type {config['model_type']!r}")
    tensors = 0
    for path in folder.glob("*.safetensors"):
        with tensor_file(path) as file:
            tensors += len(file.keys())
    check_sizes(config["text_config"], tensors)


TokenValueField = Annotated[
    InstanceOf[TokenValueModel],
    Local(),
    BeforeValidator(TokenValueModel.opened),
    PlainSerializer(lambda one: f"TokenValueModel {fingerprint(one)}", return_type=str, when_used="json"),
    WithJsonSchema({"type": "string", "format": "path"}),
]
