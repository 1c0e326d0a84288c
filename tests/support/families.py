"""Small random models of four families, and the text that the small tokenizer was trained on."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

TEXT = """the old lighthouse stood on the cliff and the sound of the sea was a whisper in the night.
The keeper seemed to listen; Elara walked along the shore, and the wind echoed through the empty tower.
It was not a dream but a testament to the sea. Café, naïve, 12 345, “quotes” – dashes… 🙂 done."""


SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 512}


def byte_tokenizer():
    """A byte-level BPE of 320 tokens: every text has tokens, many tokens are parts of characters."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build(kind: str):
    """A random model of a family, sharp enough that greedy choices are not ties."""
    torch.manual_seed(0)
    common = dict(SIZES, num_hidden_layers=4, num_attention_heads=4, pad_token_id=1, eos_token_id=0, bos_token_id=None)
    gqa = dict(common, num_key_value_heads=2, head_dim=8)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**gqa))
    elif kind == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in gqa.items() if k != "head_dim"}))
    elif kind == "gemma3":
        layers = ["sliding_attention", "full_attention"] * 2
        model = Gemma3ForCausalLM(
            Gemma3TextConfig(**gqa, sliding_window=16, layer_types=layers, query_pre_attn_scalar=8)
        )
    elif kind == "opt":
        sizes = {k: v for k, v in common.items() if k not in ("intermediate_size",)}
        model = OPTForCausalLM(OPTConfig(**sizes, ffn_dim=64, word_embed_proj_dim=32))
    else:
        raise ValueError(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    return model.eval()


def own_hooks(model):
    """What tokenry has left on a model: hooks and attributes. transformers leaves hooks of its own."""
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    marks = [m for m in model.modules() if hasattr(m, "_tokenry_attention") or hasattr(m, "_tokenry_cutter")]
    return [hook for hook in hooks if getattr(hook, "__module__", "").startswith("tokenry")] + marks
