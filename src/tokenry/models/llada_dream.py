"""Checkpoints of LLaDA and Dream as bidirectional Llama and Qwen2 models, without code from the checkpoint.

LLaDA (arXiv 2502.09992) is a Llama whose weights have other names; Dream (arXiv 2508.15487) is a Qwen2 that reads each
token from the logits of the position before it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from ..core.errors import InputError
from .checkpoint_files import check_weights, read_config
from .masks import make_bidirectional

__all__ = ["load_diffusion_checkpoint"]

LLADA_NAMES = (
    (r"^model\.transformer\.wte\.", "model.embed_tokens."),
    (r"^model\.transformer\.ln_f\.", "model.norm."),
    (r"^model\.transformer\.ff_out\.", "lm_head."),
    (r"^model\.transformer\.blocks\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ff_norm\.", ".post_attention_layernorm."),
    (r"\.(q_proj|k_proj|v_proj)\.", r".self_attn.\1."),
    (r"\.attn_out\.", ".self_attn.o_proj."),
    (r"\.ff_proj\.", ".mlp.gate_proj."),
    (r"\.up_proj\.", ".mlp.up_proj."),
    (r"\.ff_out\.", ".mlp.down_proj."),
)
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
TOKENS = ("eos_token_id", "pad_token_id", "mask_token_id")


def load_diffusion_checkpoint(folder: str | Path, dtype: torch.dtype) -> PreTrainedModel | None:
    """The model of a folder with a LLaDA or Dream checkpoint; None if it is something else.

    `config.mask_token_id` and, for Dream, `config.token_shift` say how to sample from it.

    Raises:
        InputError: a broken config, a LLaDA of another shape than the published one, or weights that are not its own.
    """
    config = read_config(folder)
    if config.get("model_type") == "llada":
        return _build(LlamaForCausalLM, _llada_config(config), _renamed(_weights(folder)), dtype)
    if config.get("model_type") == "Dream":
        return _build(Qwen2ForCausalLM, _dream_config(config), _weights(folder), dtype)
    return None


def _llada_config(config: dict[str, Any]) -> LlamaConfig:
    expected = {"block_type": "llama", "activation_type": "silu", "include_bias": False, "alibi": False}
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise InputError(f"this LLaDA has {name}={config[name]!r}; only those with {value!r} can be read")
    heads = config["n_heads"]
    return LlamaConfig(
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=config.get("n_kv_heads") or heads,
        max_position_embeddings=config["max_sequence_length"],
        rms_norm_eps=config["rms_norm_eps"],
        tie_word_embeddings=config.get("weight_tying", False),
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        bos_token_id=None,
        **{name: config[name] for name in TOKENS},
    )


def _dream_config(config: dict[str, Any]) -> Qwen2Config:
    return Qwen2Config(
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        bos_token_id=None,
        token_shift=True,  # pyright: ignore[reportCallIssue]  # a config keeps any further name
        **{name: config[name] for name in (*SIZES, *TOKENS)},
    )


def _weights(folder: str | Path) -> dict[str, Tensor]:
    return {
        name: weight for file in sorted(Path(folder).glob("*.safetensors")) for name, weight in load_file(file).items()
    }


def _renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, weight in weights.items():
        for pattern, new in LLADA_NAMES:
            name = re.sub(pattern, new, name)
        found[name] = weight
    return found


def _build(kind: type, config: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    model = kind._from_config(config, dtype=dtype)
    wanted = model.state_dict()
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = [(name, weights[name].shape, wanted[name].shape) for name in wanted.keys() & weights.keys()]
    found = {
        "missing_keys": wanted.keys() - weights.keys() - tied,
        "unexpected_keys": weights.keys() - wanted.keys(),
        "mismatched_keys": [(name, has, wants) for name, has, wants in shapes if has != wants],
    }
    check_weights(found, kind.__name__)
    model.load_state_dict(weights, strict=False)
    return make_bidirectional(model).eval()
