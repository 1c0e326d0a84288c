"""The configuration of a decoder with a small encoder before it."""

from __future__ import annotations

from typing import Any, Literal

from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from ...core.errors import InputError

__all__ = ["Causal2VecConfig", "Context", "Pooling"]

Context = Literal["encoder", "constant", "none"]
Pooling = Literal["context_eos", "context", "eos", "mean"]


class Causal2VecConfig(PreTrainedConfig):
    """Both configurations, and how the parts are put together; see the options of `Causal2Vec`.

    Args:
        decoder, encoder: as their `to_dict` gives them.
        decoder_fingerprint: of the decoder that training began with.
    """

    model_type = "causal2vec"
    decoder: dict | None = None
    encoder: dict | None = None
    decoder_fingerprint: str = ""
    encoder_pooling: str = "mean"
    projector: str = "mlp"
    context: str = "encoder"
    context_position: str = "after_instruction"
    pooling: str = "context_eos"

    def models(
        self, decoder: PreTrainedModel | None, encoder: PreTrainedModel | None
    ) -> tuple[PreTrainedModel, PreTrainedModel]:
        """Those given, or new ones as the two configurations say; others are refused."""
        made = []
        for name, model in (("decoder", decoder), ("encoder", encoder)):
            stored: dict[str, Any] = getattr(self, name) or {}
            if "model_type" not in stored:
                raise InputError(f"the configuration of Causal2Vec has no {name}; give decoder and encoder")
            if model is None:
                model = AutoModel.from_config(AutoConfig.for_model(**stored), trust_remote_code=False)
            elif model.config.hidden_size != stored.get("hidden_size"):
                raise InputError(
                    f"the {name} is {model.config.hidden_size} wide, the projector is made for "
                    f"{stored.get('hidden_size')}; give the {name} of the configuration"
                )
            made.append(model)
        return made[0], made[1]


AutoConfig.register("causal2vec", Causal2VecConfig)  # else reading the tokenizers of a folder warns
