"""Where things are in a model: layers, heads, MLPs, attention, weights. What we know of a model's structure is here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from ..core.errors import InputError
from .kv_cache import new_cache, state_argument, without_adapters
from .llamacpp.model import LlamaCppModel

__all__ = [
    "Projection",
    "decoder_layers",
    "fingerprint",
    "full_attention_layers",
    "gated_mlp",
    "reads_ids",
    "shape_of",
    "unembedding",
]


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's attention modules that go through transformers' attention interface, by layer."""
    found = [m for m in decoder_layers(model).modules() if hasattr(m, "layer_idx") and hasattr(m, "q_proj")]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no attention layers with q_proj; use a Llama- or Gemma-like model"
        )
    if any(module.layer_idx is None or layer_number(module) < 0 for module in found):
        raise InputError(
            f"attention layers of {type(model).__name__} do not know their number, as they are shared; use a model in "
            "which every layer has its own"
        )
    return sorted(found, key=layer_number)


def layer_number(module: nn.Module) -> int:
    """Which layer an attention module belongs to."""
    return cast(int, module.layer_idx)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder blocks of a causal language model; the towers of other senses are not looked at.

    Raises:
        InputError: the decoder has no list of `num_hidden_layers` blocks, or several, or llama.cpp runs it.
    """
    if isinstance(model, LlamaCppModel):
        raise model.refusal("what acts on its layers")
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    found = outermost(decoder_body(model), lambda part: isinstance(part, nn.ModuleList) and len(part) == count)
    lists = cast(list[nn.ModuleList], found)
    if len(lists) > 1:  # as long as the blocks may be a list of norms or of projections
        lists = [blocks for blocks in lists if isinstance(blocks[0], GradientCheckpointingLayer)]
    if len(lists) != 1:
        how_many = "several lists" if lists else "no list"
        raise InputError(f"{type(model).__name__} has {how_many} of {count} decoder layers; use a decoder-only model")
    return lists[0]


def decoder_body(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder without its head, which makes hidden states of ids; adapters of peft stay inside it.

    Raises:
        InputError: peft puts virtual tokens before the text, which only its own forward knows of.
    """
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise InputError(
            f"{type(model).__name__} puts virtual tokens before each text, which hooks do not see; use a LoRA adapter"
        )
    inner = without_adapters(model)
    # OPT calls its decoder without its base model; a head may be called `decoder`, too; Llama 4 names no base model
    found = (inner.get_decoder(), inner.base_model, getattr(inner, "model", None))
    return next((part for part in found if isinstance(part, PreTrainedModel) and part is not inner), inner)


def outermost(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """The modules that are wanted, without those inside them (a block may hold as many experts as there are blocks) and
    without those of other models inside this one, such as a vision tower."""
    if wanted(module):
        return [module]
    parts = [part for part in module.children() if not isinstance(part, PreTrainedModel)]
    return [found for part in parts for found in outermost(part, wanted)]


def hidden_states(output: object) -> Tensor:
    """The hidden states (batch, time, width) among what a block returns.

    Raises:
        InputError: the block returns something else.
    """
    hidden = output[0] if isinstance(output, tuple | list) and not hasattr(output, "_fields") else output
    if not isinstance(hidden, Tensor) or hidden.dim() != 3:
        given = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise InputError(
            f"the layers of this model return {given} and not hidden states (batch, time, width); use a model with one "
            "residual stream"
        )
    return hidden


def check_layers(layers: nn.ModuleList, wanted: Collection[int]) -> None:
    for index in wanted:
        if not 0 <= index < len(layers):
            raise InputError(f"layer {index} does not exist; this model has layers 0 to {len(layers) - 1}")


def head_mixer(model: PreTrainedModel, layer: int) -> tuple[nn.Module, int]:
    """The projection that mixes the heads of a layer, and head_dim: its input is (batch, time, heads * head_dim)."""
    layers = decoder_layers(model)
    check_layers(layers, [layer])
    attention = cast(Any, getattr(layers[layer], "self_attn", None))
    for name in ("o_proj", "out_proj"):
        if hasattr(attention, name):
            return getattr(attention, name), attention.head_dim
    raise InputError(f"{type(model).__name__} has no self_attn.o_proj; use a Llama- or Gemma-like model")


class Projection(NamedTuple):
    """A linear layer, and which of its outputs are the neurons: a model may fuse gate and up in one layer."""

    module: nn.Module
    outputs: slice


def down_projection(model: PreTrainedModel, layer: int) -> nn.Module:
    """The layer that writes the neurons of an MLP to the residual stream; its input is (batch, time, neurons)."""
    layers = decoder_layers(model)
    check_layers(layers, [layer])
    down = getattr(getattr(layers[layer], "mlp", None), "down_proj", None)
    if down is None:
        raise InputError(f"layer {layer} of {type(model).__name__} has no mlp.down_proj; use a Llama-like model")
    return down


def gated_mlp(model: PreTrainedModel, layer: int) -> dict[Literal["gate", "up"], Projection]:
    """The two input sides of a gated MLP, m = up(x) * act(gate(x)). Fused rows are gate first, then up (Phi-3).

    Raises:
        InputError: no such layer, a mixture of experts, or an MLP without a gate.
    """
    layers = decoder_layers(model)
    check_layers(layers, [layer])
    mlp = cast(Any, getattr(layers[layer], "mlp", None))
    if hasattr(mlp, "experts") or hasattr(layers[layer], "block_sparse_moe"):
        raise InputError(
            f"layer {layer} of {type(model).__name__} is a mixture of experts, whose neurons have no one number; "
            "use a model with one MLP per layer"
        )
    down = down_projection(model, layer)
    if hasattr(mlp, "gate_up_proj"):
        half = mlp.gate_up_proj.out_features // 2
        return {
            "gate": Projection(mlp.gate_up_proj, slice(0, half)),
            "up": Projection(mlp.gate_up_proj, slice(half, 2 * half)),
        }
    if not (hasattr(mlp, "gate_proj") and hasattr(mlp, "up_proj")):
        raise InputError(f"layer {layer} of {type(model).__name__} has no gated MLP; use a Llama- or Phi-3-like model")
    every = slice(0, down.in_features)
    return {"gate": Projection(mlp.gate_proj, every), "up": Projection(mlp.up_proj, every)}


def unwrapped(module: nn.Module) -> nn.Module:
    """The layer inside what peft puts around it: for its sizes, not for its weight (see `effective_weight`)."""
    inner = getattr(module, "original_module", None) or getattr(module, "base_layer", None)
    return module if inner is None else unwrapped(inner)


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many tokens have an embedding."""
    if isinstance(model, LlamaCppModel):
        return model.weights.vocabulary
    return cast(int, unwrapped(model.get_input_embeddings()).num_embeddings)


def effective_weight(module: nn.Module, what: str) -> Tensor:
    """The weight (outputs, inputs) that a layer computes with: its own, and the LoRA adapters active on it.

    Args:
        what: the layer in words.

    Raises:
        InputError: quantized or offloaded weights, or an adapter whose change is no sum.
    """
    layer = cast(Any, module)  # peft gives its layers much that no plain one has
    parts = layer._modules
    if "modules_to_save" in parts:  # peft: a copy that was trained as a whole
        off = layer.disable_adapters or not layer.active_adapters
        layer = layer.original_module if off else layer.modules_to_save[layer.active_adapters[0]]
    elif "token_adapter" in parts:  # peft: some rows of an embedding
        layer = layer.token_adapter
    weight = cast(Tensor, unwrapped(layer).weight).detach()
    if not weight.is_floating_point() or weight.itemsize < 2 or weight.dim() != 2:
        raise InputError(f"{what} holds quantized weights ({weight.dtype}); load the model in bfloat16 or float32")
    if weight.is_meta:
        raise InputError(f"{what} is offloaded; load the model on one device")
    if "base_layer" not in layer._modules or layer.disable_adapters != layer.merged:
        return weight  # no adapter, or one that is off, or in the weight already
    for name in layer.active_adapters:
        if layer.merged or not hasattr(layer, "lora_A") or name in layer.lora_variant:  # such as DoRA
            raise InputError(
                f"{what} has the adapter {name!r} ({type(layer).__name__}), whose change of the weight is not a sum; "
                "call merge_and_unload() first"
            )
        if name in layer.scaling:
            weight = weight + layer.get_delta_weight(name).detach().to(weight.dtype)
    return weight


def fingerprint(model: PreTrainedModel) -> str:
    """A short hash of the architecture and a sample of every weight: artifacts are bound to it."""
    if isinstance(model, LlamaCppModel):
        raise model.refusal("what is bound to its weights")
    digest = hashlib.sha256()
    config = model.config.get_text_config()
    digest.update(f"{config.model_type} {config.num_hidden_layers} {config.hidden_size} {config.vocab_size}".encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16).float()
        digest.update(name.encode() + sample.numpy().tobytes())
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and hasattr(module, "base_layer"):
            digest.update(f"{name} {module.active_adapters} {module.disable_adapters}".encode())
    return digest.hexdigest()[:16]


def checkpoints_activations(model: PreTrainedModel) -> bool:
    """Whether layers compute their activations again for gradients, and then keep no cache."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def unembedding(model: PreTrainedModel) -> Tensor:
    """The weight (vocabulary, width) of the output head."""
    return effective_weight(output_head(model), "the output head")


def output_head(model: PreTrainedModel) -> nn.Module:
    """The layer that makes logits of final hidden states."""
    return cast(nn.Module, model.get_output_embeddings())


def full_attention_layers(model: PreTrainedModel) -> list[int]:
    """Layers whose cache grows with the text. Sliding-window and recurrent layers are not worth cutting.

    Raises:
        InputError: there are none.
    """
    cache = new_cache(model) if state_argument(model) == "past_key_values" else None
    if cache is None:
        raise InputError(f"{type(model).__name__} fills no cache of keys and values; there is nothing to compress")
    shared = getattr(model.config.get_text_config(), "num_kv_shared_layers", 0)
    if shared:
        raise InputError(
            f"{shared} layers of {type(model).__name__} read the keys of others and would miss what is cut; use a "
            "model without shared layers"
        )
    layers = cache.layers
    found = [i for i, layer in enumerate(layers) if type(layer) is DynamicLayer]
    if not found:
        raise InputError(
            f"every layer of {type(model).__name__} keeps only a window or a state; there is no cache to compress"
        )
    return found


def shape_of(model: PreTrainedModel) -> dict[str, int]:
    """Layers, query heads and key-value heads of a model."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return {"layers": config.num_hidden_layers, "heads": heads, "kv_heads": kv_heads}


def reads_ids(model: PreTrainedModel) -> bool:
    """Whether more than the embedding depends on token ids: embeddings for each layer, or experts chosen by id."""
    config = model.config.get_text_config()
    named = ("hidden_size_per_layer_input", "ple_layer_ids")
    return any(getattr(config, name, None) for name in named) or "hash_moe" in getattr(config, "mlp_layer_types", ())
