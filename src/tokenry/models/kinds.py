"""What a model is for, as its configuration says: it decides how a checkpoint is loaded and which methods take it."""

from __future__ import annotations

from typing import Literal

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_IMAGE_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
)

__all__ = ["Kind", "kind_of"]

Kind = Literal["causal", "denoiser", "vision_language", "vision", "ssm", "embedding", "seq2seq"]

RECURRENT = {"mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"}  # a state of fixed size and no keys in any layer
TWO_WAYS = {"bert-generation"}  # an encoder in no list of transformers
IMAGES = (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_IMAGE_MAPPING,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
)


def kind_of(config: PreTrainedConfig) -> Kind:
    """The kind of a model; "causal" for what transformers has in no list, such as a class that a checkpoint brings.

    A model that writes from left to right with recurrent and attention layers is causal, as it fills a cache of keys.
    """
    if config.is_encoder_decoder:
        return "seq2seq"
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return "vision_language"
    if config.model_type in RECURRENT:
        return "ssm"
    if _encodes(config):
        return "embedding"
    if config.base_config_key == "vision_config" or any(type(config) in mapping for mapping in IMAGES):
        return "vision"
    return "causal" if getattr(config.get_text_config(decoder=True), "is_causal", True) else "denoiser"


def _encodes(config: PreTrainedConfig) -> bool:
    known = config.model_type in TWO_WAYS or any(
        type(config) in mapping for mapping in (MODEL_FOR_MASKED_LM_MAPPING, MODEL_FOR_TEXT_ENCODING_MAPPING)
    )
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:  # an encoder that may be turned into a decoder says which it is
        return known and not getattr(config, "is_decoder", True)
    return known
