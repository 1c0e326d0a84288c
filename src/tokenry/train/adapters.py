"""LoRA on the last layers of a model, and its merge into a model of its own."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core.errors import InputError
from ..models.anatomy import decoder_layers

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

__all__ = ["lora_last_layers", "merged", "save_adapter", "untie", "with_adapter", "without_adapter"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_last_layers(
    model: PreTrainedModel, rank: int = 128, last: int = 6, dropout: float = 0.05, lm_head: bool = True
) -> LoraConfig:
    """LoRA (alpha = rank) on the projections of the `last` blocks and on the unembedding; the rest is frozen."""
    try:
        from peft import LoraConfig
    except ModuleNotFoundError:
        raise InputError("LoRA needs the package peft; run `pip install tokenry[train]`") from None
    depth = len(decoder_layers(model))
    if not 1 <= last <= depth:
        raise InputError(f"last_layers={last} is not allowed; this model has 1 to {depth} layers")
    layers = "|".join(map(str, range(depth - last, depth)))
    modules = rf".*\.({layers})\.(.*\.)?({'|'.join(PROJECTIONS)})" + ("|lm_head" if lm_head else "")
    return LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=modules, task_type="CAUSAL_LM")


def with_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The model with a fresh adapter, which changes nothing yet."""
    from peft import get_peft_model

    with warnings.catch_warnings():  # about tied embeddings, which `merged` unties
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return get_peft_model(model, config)


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """The adapter alone; peft would add the whole embeddings where the unembedding is adapted."""
    model.save_pretrained(str(folder), save_embedding_layers=False)


def without_adapter(model: PeftModel) -> PreTrainedModel:
    """The model as it was before its adapter."""
    plain = model.unload()
    vars(plain).pop("peft_config", None)  # peft leaves it, and would take the next adapter for a second one
    return plain


def untie(model: PreTrainedModel) -> None:
    """Give the unembedding weights of its own where it shares the embeddings', so that it can be trained alone."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    head = cast(nn.Linear, getattr(head, "base_layer", head))  # with an adapter on it
    if head.weight is embeddings.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def merged(model: PeftModel) -> PreTrainedModel:
    """The plain model with the active adapter merged into its weights; embeddings keep their own."""
    untie(cast(PreTrainedModel, model.get_base_model()))
    with torch.no_grad():
        return model.merge_and_unload()
