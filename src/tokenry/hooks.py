"""The residual stream: watch it, edit it, skip layers. Context managers that leave nothing behind.

`resid[i]` is the output of decoder layer i, of shape (batch, time, width), before any final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import InputError

__all__ = ["add_to_residual", "capture_residual", "decoder_layers", "edit_residual", "skip_layers"]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder blocks of a causal language model.

    Raises:
        InputError: the model has no list of `num_hidden_layers` blocks.
    """
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(model).__name__} has no list of {count} decoder layers; use a decoder-only model")


def _check(layers: nn.ModuleList, wanted: Collection[int]) -> None:
    for index in wanted:
        if not 0 <= index < len(layers):
            raise InputError(f"layer {index} does not exist; this model has layers 0 to {len(layers) - 1}")


@contextmanager
def edit_residual(model: PreTrainedModel, edits: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replace the output h of layer i by `edits[i](h)`. Nests; several edits of a layer apply in order."""
    layers = decoder_layers(model)
    _check(layers, edits)
    with ExitStack() as stack:
        for index, edit in edits.items():

            def hook(module: nn.Module, args: tuple, output: object, edit: Callable = edit) -> object:
                if isinstance(output, tuple):  # older blocks return (hidden, ...)
                    return (edit(output[0]), *output[1:])
                return edit(output)

            stack.callback(layers[index].register_forward_hook(hook).remove)
        yield


@contextmanager
def capture_residual(model: PreTrainedModel, layers: Collection[int]) -> Iterator[dict[int, list[Tensor]]]:
    """Collect the outputs of `layers`: {layer: [one (batch, time, width) tensor per forward]}."""
    caught: dict[int, list[Tensor]] = {index: [] for index in layers}

    def keep(index: int) -> Callable[[Tensor], Tensor]:
        def store(hidden: Tensor) -> Tensor:
            caught[index].append(hidden.detach())
            return hidden

        return store

    with edit_residual(model, {index: keep(index) for index in layers}):
        yield caught


@contextmanager
def add_to_residual(model: PreTrainedModel, vectors: Mapping[int, Tensor]) -> Iterator[None]:
    """Steer: add `vectors[i]`, of shape (width,) or (batch, width), to the output of layer i at every position."""

    def shift(vector: Tensor) -> Callable[[Tensor], Tensor]:
        def add(hidden: Tensor) -> Tensor:
            v = vector.to(hidden.device, hidden.dtype)
            return hidden + (v if v.dim() == 1 else v[:, None, :])

        return add

    with edit_residual(model, {index: shift(vector) for index, vector in vectors.items()}):
        yield


class _Skipped(nn.Module):
    """Stands in for a decoder block that does not run."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not registered as a submodule

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["block"], name)  # models read attributes such as `attention_type`

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor:
        return hidden_states


@contextmanager
def skip_layers(model: PreTrainedModel, executed: Collection[int]) -> Iterator[None]:
    """Run only the decoder layers in `executed`; the others pass their input on and do not touch the cache.

    Hooks on skipped blocks do not fire. Restores the model also after an error.
    """
    layers = decoder_layers(model)
    _check(layers, executed)
    skipped = {i: layers[i] for i in range(len(layers)) if i not in executed}
    try:
        for index, block in skipped.items():
            layers[index] = _Skipped(block)
        yield
    finally:
        for index, block in skipped.items():
            layers[index] = block


def fingerprint(model: PreTrainedModel) -> str:
    """A short hash of the architecture and a sample of the weights: artifacts are bound to it."""
    import hashlib

    digest = hashlib.sha256()
    config = model.config.get_text_config()
    digest.update(f"{config.model_type} {config.num_hidden_layers} {config.hidden_size} {config.vocab_size}".encode())
    state = list(model.named_parameters())
    for name, weight in state[:: max(1, len(state) // 8)]:
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16).float()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
