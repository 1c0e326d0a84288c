"""Small random models as F32 GGUF files, written tensor by tensor: the same numbers as the torch model."""

import json

import gguf
import torch

FROM_LLAMA = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
FROM_GEMMA = FROM_LLAMA | {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def save_gguf(model, tokenizer, path, architecture="llama"):
    """A Llama or a Gemma 3, and its byte-level BPE tokenizer, as a GGUF file."""
    config, writer = model.config, gguf.GGUFWriter(str(path), architecture)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    gemma = config.model_type == "gemma3_text"
    rope = config.rope_parameters["full_attention"] if gemma else config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    if gemma:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    for name, tensor in model.state_dict().items():
        layer, part = _place(name, FROM_GEMMA if gemma else FROM_LLAMA)
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(part)
        if gemma:
            if part == "output":  # which is the embedding
                continue
            heads, tensor = None, tensor + 1 if "norm" in part else tensor  # transformers multiplies by 1 + weight
        writer.add_tensor(
            f"blk.{layer}.{part}.weight" if layer else f"{part}.weight",
            (tensor if heads is None else _permuted(tensor, heads)).float().numpy(),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _place(name, names):
    """The layer, or None, and llama.cpp's name of a weight of transformers."""
    parts = name.removeprefix("model.").removesuffix(".weight").split(".")
    layer = parts[1] if parts[0] == "layers" else None
    return layer, names[".".join(parts[2:] if layer else parts)]


def _permuted(weight, heads):
    """llama.cpp turns neighboring channels of a head, transformers those that are half a head apart."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape).contiguous()


def _add_tokenizer(writer, tokenizer):
    raw = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in raw["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)


def dropping(model, layers):
    """The model without its last layers: a drafter that agrees now and then."""
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": layers})
    small = type(model)(config).eval()
    small.load_state_dict({k: v for k, v in model.state_dict().items() if k in small.state_dict()})
    return small


def logits_of(model, ids):
    """(len(ids), vocabulary) of a torch model."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]
