"""A tiny random model of every architecture that transformers loads as a causal language model."""

import dataclasses
import inspect

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ARCHITECTURES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY, LAYERS, WINDOW = 320, 4, 8

# Set wherever a configuration has a field of that name.
SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "input_embedding_size"), 32),
    **dict.fromkeys(("output_embedding_size", "lru_width", "pronunciation_embed_dim", "shape_embed_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "dff", "ffn_hidden_size", "dim_ff"), 64),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "shared_intermediate_size", "intermediate_size_mlp"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth"), LAYERS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "kv_channels", "linear_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 512),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size", "window_size"), WINDOW),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "laurel_rank", "router_hidden_size"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    "index_n_heads": 2,
    "index_topk": 512,
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_ssm": 64,
    "rotary_dim": 4,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "image_size": 28,
    "patch_size": 14,
    "is_decoder": True,
}  # fmt: skip

SLIDING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
RECURRENT = {"layer_types": ["linear_attention", "full_attention"] * (LAYERS // 2)}
CONVOLUTION = {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)}
HYBRID = {"layers_block_type": ["linear_attention", "hybrid"] * (LAYERS // 2), "num_key_value_heads": 4}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_budget": 8, "indexer_compress_ratio": 4}
WINDOWED = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16}
# What the table does not fit, by the type of the configuration. `...` stands for the configuration's own default.
OWN = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {"layer_types": SLIDING, "rope_parameters": dict.fromkeys(SLIDING, ROPE)},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 64},
    },
    "dots1": {"n_routed_experts": 4},
    "dots3_note_audio_encoder": {"adapter_input_size": 32},
    "dots3_note_text": {
        **WINDOWED,
        "num_key_value_heads": 4,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {"num_hidden_layers": ..., "adapter_in_dim": 32},
    "gemma3_text": {"layer_types": SLIDING},
    "gemma3n_text": {"layer_types": SLIDING, "num_kv_shared_layers": 2},
    "gemma4_unified_vision": {"mm_embed_dim": 32, "output_proj_dims": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "granitemoehybrid": RECURRENT,
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"] * (LAYERS // 2)},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"] * (LAYERS // 2)},
    "kimi_linear": RECURRENT,
    "lfm2": CONVOLUTION,
    "lfm2_moe": CONVOLUTION,
    "mamba2": {"num_heads": 8},
    "moshi": {"sliding_window": 512},  # its prefill sees beyond the window that its cache keeps
    "qwen4_exp_text": {**INDEXER, "indexer_head_dim": 8},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"] * (LAYERS // 2), "num_buckets": 4},
    "xlm": {"emb_dim": 32},
    "xlstm": {"num_heads": 4, "head_dim": ...},
    "xmod": {"default_language": "en_XX"},
    "zamba": HYBRID,
    "zamba2": HYBRID,
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(kind):
    """A small configuration of a model type, its sub-configurations too."""
    cls = CONFIG_MAPPING[kind]
    names = _fields(cls)
    values = {name: size for name, size in SIZES.items() if name in names}
    if "kv_lora_rank" in names:  # latent attention has as many key heads as query heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    for name, spec in (getattr(cls, "sub_configs_defaults", None) or {}).items():
        values[name] = tiny_config(spec.model_type)
    values = {name: value for name, value in (values | OWN.get(kind, {})).items() if value is not ...}
    config = cls(**values)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if "layer_types" in names and len(kinds) == 2:  # one after the other, so that few layers hold both
        config = cls(**values | {"layer_types": kinds * (LAYERS // 2)})
    return config


def _fields(cls):
    if dataclasses.is_dataclass(cls):
        return {field.name for field in dataclasses.fields(cls)}
    return set(inspect.signature(cls.__init__).parameters)


def tiny_model(kind):
    """A random model, sharp enough that greedy choices are not ties."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    model.generation_config = GenerationConfig(pad_token_id=1)  # nothing that ends a text, or forces a token
    return model
