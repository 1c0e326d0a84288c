"""Inside a forward: watch and edit the residual stream, heads and neurons, skip layers. All are context managers
that nest and leave nothing behind, also after an error.

Layers are numbered as decoder blocks; a block's output has shape (batch, time, width) and comes before any final
norm. (A `Trace` counts the states between the blocks: its `resid[i + 1]` is the output of block i.)
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import InputError

__all__ = [
    "Feed",
    "ablate_heads",
    "add_to_residual",
    "capture_residual",
    "clamp_neurons",
    "decoder_layers",
    "edit_residual",
    "fingerprint",
    "on_feed",
    "patch_resid",
    "skip_layers",
]


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


@dataclass(frozen=True)
class Feed:
    """What one forward was given. `ids` (batch, new), `mask` (batch, columns) or None, `positions` or None.

    `start` is how many columns the cache held before, so that column `start + i` belongs to `ids[:, i]`.
    """

    ids: Tensor | None
    mask: object
    positions: Tensor | None
    start: int
    new: int

    @property
    def stop(self) -> int:
        return self.start + self.new


@contextmanager
def on_feed(model: PreTrainedModel, begin: Callable[[Feed], None]) -> Iterator[None]:
    """Call `begin(feed)` before every forward of the model's body."""
    body = model.base_model
    signature = inspect.signature(body.forward)

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        ids, embeds, cache = given.get("input_ids"), given.get("inputs_embeds"), given.get("past_key_values")
        new = (ids if ids is not None else embeds).shape[1]
        start = 0 if cache is None else int(cache.get_seq_length())
        begin(Feed(ids, given.get("attention_mask"), given.get("position_ids"), start, new))

    handle = body.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def patch_resid(model: PreTrainedModel, layer: int, positions: Sequence[int], values: Tensor) -> Iterator[None]:
    """Replace the output of `layer` at token columns `positions` by `values` (positions or 1, width).

    Columns count from the start of the sequence (padding included), so cached steps leave them alone.
    """
    where, feeds = torch.as_tensor(positions), []

    def begin(feed: Feed) -> None:
        feeds[:] = [feed]

    def patch(hidden: Tensor) -> Tensor:
        inside = (where >= feeds[0].start) & (where < feeds[0].stop)
        if not inside.any():
            return hidden
        hidden = hidden.clone()
        new = values.to(hidden.device, hidden.dtype).expand(len(where), -1)
        hidden[:, where[inside] - feeds[0].start] = new[inside]
        return hidden

    with on_feed(model, begin), edit_residual(model, {layer: patch}):
        yield


@contextmanager
def edit_inputs(edits: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replace the input x of each module by `edits[module](x)`."""
    with ExitStack() as stack:
        for module, edit in edits.items():

            def hook(module: nn.Module, args: tuple, edit: Callable = edit) -> tuple:
                return (edit(args[0]), *args[1:])

            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def head_mixer(model: PreTrainedModel, layer: int) -> tuple[nn.Module, int]:
    """The projection that mixes the heads of a layer, and head_dim: its input is (batch, time, heads * head_dim)."""
    layers = decoder_layers(model)
    _check(layers, [layer])
    attention = getattr(layers[layer], "self_attn", None)
    for name in ("o_proj", "out_proj"):
        if hasattr(attention, name):
            return getattr(attention, name), attention.head_dim
    raise InputError(f"{type(model).__name__} has no self_attn.o_proj; use a Llama- or Gemma-like model")


def ablate_heads(model: PreTrainedModel, heads: Mapping[int, Sequence[int]]):
    """Context manager: the heads `heads[layer]` write nothing to the residual stream."""

    def silence(head_dim: int, layer: int, chosen: Sequence[int], count: int) -> Callable[[Tensor], Tensor]:
        for head in chosen:
            if not 0 <= head < count:
                raise InputError(f"head {head} does not exist; layer {layer} has heads 0 to {count - 1}")

        def edit(x: Tensor) -> Tensor:
            split = x.unflatten(-1, (count, head_dim)).clone()
            split[..., list(chosen), :] = 0
            return split.flatten(-2)

        return edit

    edits = {}
    for layer, chosen in heads.items():
        mixer, head_dim = head_mixer(model, layer)
        edits[mixer] = silence(head_dim, layer, chosen, mixer.in_features // head_dim)
    return edit_inputs(edits)


def clamp_neurons(model: PreTrainedModel, neurons: Mapping[int, Mapping[int, float]]):
    """Context manager: MLP neuron n of layer i has the activation `neurons[i][n]` at every position.

    A neuron is an input of `mlp.down_proj`.
    """
    layers = decoder_layers(model)
    _check(layers, neurons)

    def hold(values: Mapping[int, float], width: int) -> Callable[[Tensor], Tensor]:
        for neuron in values:
            if not 0 <= neuron < width:
                raise InputError(f"neuron {neuron} does not exist; this layer has neurons 0 to {width - 1}")

        def edit(x: Tensor) -> Tensor:
            x = x.clone()
            x[..., list(values)] = x.new_tensor(list(values.values()))
            return x

        return edit

    edits = {}
    for layer, values in neurons.items():
        down = getattr(getattr(layers[layer], "mlp", None), "down_proj", None)
        if down is None:
            raise InputError(f"layer {layer} of {type(model).__name__} has no mlp.down_proj; use a Llama-like model")
        edits[down] = hold(values, down.in_features)
    return edit_inputs(edits)


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
    digest = hashlib.sha256()
    config = model.config.get_text_config()
    digest.update(f"{config.model_type} {config.num_hidden_layers} {config.hidden_size} {config.vocab_size}".encode())
    state = list(model.named_parameters())
    for name, weight in state[:: max(1, len(state) // 8)]:
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.bfloat16).float()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]
