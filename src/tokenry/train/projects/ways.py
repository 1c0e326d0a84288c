"""The ways to tune a model to one project: which weights are trained, what that costs, and what must be stored.

Paper: arXiv 2208.13928, which compares all weights, embeddings with the output layer, the last block, and a prefix.
LoRA is there to compare with.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...core.errors import InputError
from ...models.anatomy import checkpoints_activations, decoder_layers, full_attention_layers, output_head
from ..adapters import lora_last_layers, with_adapter

__all__ = [
    "RATES",
    "WAYS",
    "Report",
    "Tuning",
    "Way",
    "personalize",
    "report",
    "text_prefix",
    "trained",
    "training_flops",
]

Way = Literal["custom", "embeddings", "last_block", "prefix", "lora"]
WAYS: tuple[Way, ...] = get_args(Way)
RATES: dict[Way, float] = {"custom": 2e-5, "embeddings": 1e-4, "last_block": 5e-4, "prefix": 2e-3, "lora": 2e-4}
RANDOM_PREFIX_RATE = 1e-2


class Tuning(NamedTuple):
    """How a model is tuned: the way, blocks of `last_block`, tokens of `prefix`, rank of `lora`."""

    way: Way
    last_n_blocks: int = 1
    virtual_tokens: int = 20
    rank: int = 16


def personalize(model: PreTrainedModel, tuning: Tuning, prefix: Tensor | None = None) -> PreTrainedModel:
    """The model with only the weights of one way to be trained.

    Nothing of what it computes changes, but for a prefix: its tokens are attended to from the start.

    Args:
        prefix: (tokens, 2 * layers * key-value heads * head_dim), see `text_prefix`; None: random.

    Returns:
        The model itself, or for `prefix` and `lora` the `peft.PeftModel` around it.

    Raises:
        InputError: a way that this model cannot be tuned in.
    """
    check_model(model, tuning)
    if tuning.way == "prefix":
        return with_prefix(model, tuning.virtual_tokens, prefix)
    if tuning.way == "lora":
        config = lora_last_layers(model, tuning.rank, len(decoder_layers(model)), dropout=0.0, lm_head=False)
        return cast(PreTrainedModel, with_adapter(model, config))
    chosen = {id(weight) for weight in _chosen(model, tuning)}
    for weight in model.parameters():
        weight.requires_grad_(id(weight) in chosen)
    return model


def _chosen(model: PreTrainedModel, tuning: Tuning) -> Iterator[nn.Parameter]:
    """The weights of the model itself that are trained."""
    if tuning.way == "custom":
        yield from model.parameters()
    elif tuning.way == "embeddings":
        yield from model.get_input_embeddings().parameters()
        yield from output_head(model).parameters()
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in ("wpe", "embed_positions"):  # learned positions
                yield from module.parameters()
    else:
        yield from decoder_layers(model)[-tuning.last_n_blocks :].parameters()


def check_model(model: PreTrainedModel, tuning: Tuning) -> None:
    """Refuse what cannot be tuned in this way."""
    depth = len(decoder_layers(model))
    if model.config.is_encoder_decoder:
        raise InputError(f"{type(model).__name__} has an encoder; tune a decoder-only model")
    if tuning.way in ("custom", "embeddings", "last_block"):
        fixed = next((name for name, weight in model.named_parameters() if not weight.is_floating_point()), None)
        if fixed or getattr(model, "is_quantized", False):
            raise InputError(
                f"weights of this model are quantized and cannot be trained; use way=lora, not {tuning.way}"
            )
    if tuning.way == "last_block" and not 1 <= tuning.last_n_blocks <= depth:
        raise InputError(f"last_n_blocks={tuning.last_n_blocks} is not allowed; this model has 1 to {depth} blocks")
    if tuning.way == "prefix":
        if len(full_attention_layers(model)) < depth:
            raise InputError("layers with a sliding window lose a prefix out of sight; use another way for this model")
        if checkpoints_activations(model):
            raise InputError(
                "a prefix is lost with gradient checkpointing; call model.gradient_checkpointing_disable()"
            )


def with_prefix(model: PreTrainedModel, tokens: int, prefix: Tensor | None) -> PreTrainedModel:
    """The model with a prefix of keys and values before every text."""
    try:
        from peft import PrefixTuningConfig, get_peft_model
    except ModuleNotFoundError:
        raise InputError("a prefix needs the package peft; run `pip install tokenry[train]`") from None
    with warnings.catch_warnings():  # peft asks for an attribute that transformers renames
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens))
    ((_, learned),) = trained(wrapped).items()
    if prefix is not None:
        if prefix.shape != learned.shape:
            raise InputError(
                f"the prefix has shape {tuple(prefix.shape)}, this model needs {tuple(learned.shape)}; use another way"
            )
        with torch.no_grad():
            learned.copy_(prefix)
    return cast(PreTrainedModel, wrapped)


@torch.no_grad()
def text_prefix(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """The prefix that is the same as these tokens before the text: their keys and values.

    Returns:
        (tokens, 2 * layers * key-value heads * head_dim): keys and values of the first layer, then of the second, ...
    """
    cache = model(torch.tensor([list(ids)], device=model.device), use_cache=True).past_key_values
    rows = [kept[0] for layer in cache.layers for kept in (layer.keys, layer.values)]
    if len({row.shape for row in rows}) > 1:
        raise InputError("the layers of this model have keys of different sizes, which no prefix fits; use another way")
    return torch.stack(rows).permute(2, 0, 1, 3).flatten(1)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are trained, by name; a shared one has one name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


class Report(NamedTuple):
    """How many weights are trained, of how many, and the bytes that a project needs."""

    trained: int
    weights: int
    bytes: int


def report(model: nn.Module) -> Report:
    """What is trained of a model and what that takes to store."""
    mine = trained(model).values()
    count = sum(weight.numel() for weight in mine)
    return Report(count, sum(w.numel() for w in model.parameters()), sum(w.numel() * w.element_size() for w in mine))


def training_flops(model: PreTrainedModel, tuning: Tuning, tokens: int) -> float:
    """Operations of training on that many tokens: 2 for every weight of a matrix product that they pass forward, 2 for
    every one that their gradient passes, and 2 for every one that is trained. Attention itself comes on top.

    Args:
        model: before or after `personalize`.
    """
    plain = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    sizes = [matrix_weights(block) for block in decoder_layers(plain)]
    head, blocks = matrix_weights(output_head(plain)), sum(sizes)
    forward, top = 2 * (blocks + head), sum(sizes[-tuning.last_n_blocks :])
    of_way = {
        "custom": 3 * forward,
        "embeddings": 2 * forward + 2 * head,
        "last_block": forward + 2 * head + 4 * top,
        "prefix": 2 * forward,
        "lora": 2 * forward + 6 * sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name),
    }
    return float(of_way[tuning.way]) * tokens


def matrix_weights(block: nn.Module) -> int:
    """How many weights of a block are in matrix products; those of adapters are not counted."""
    return sum(w.numel() for name, w in block.named_parameters() if w.dim() == 2 and "lora_" not in name)
