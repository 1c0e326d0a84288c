"""Inside a forward: watch and edit the residual stream, heads and neurons, skip layers. All are context managers
that nest, may end in any order, and leave nothing behind, also after an error. Each belongs to the thread that entered
it; meanwhile another thread is refused the model (see `holding`).

Layers are numbered as decoder blocks; a block's output has shape (batch, time, width) and comes before any final
norm. (A `Trace` counts the states between the blocks: its `resid[i + 1]` is the output of block i.)
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache import held_columns
from .errors import InputError
from .holding import hold, hooked, owned

__all__ = [
    "Feed",
    "LayerSwitch",
    "Projection",
    "ablate_heads",
    "add_to_residual",
    "capture_residual",
    "clamp_neurons",
    "decoder_layers",
    "edit_outputs",
    "edit_residual",
    "fingerprint",
    "gated_mlp",
    "mask_layers",
    "on_feed",
    "patch_resid",
    "skip_layers",
]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder blocks of a causal language model; the towers of other senses are not looked at.

    Raises:
        InputError: the decoder has no list of `num_hidden_layers` blocks, or several.
    """
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    lists = outermost(decoder_body(model), lambda part: isinstance(part, nn.ModuleList) and len(part) == count)
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
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
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


def _check(layers: nn.ModuleList, wanted: Collection[int]) -> None:
    for index in wanted:
        if not 0 <= index < len(layers):
            raise InputError(f"layer {index} does not exist; this model has layers 0 to {len(layers) - 1}")


@contextmanager
def edit_residual(model: PreTrainedModel, edits: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replace the output h of layer i by `edits[i](h)`. Nests; several edits of a layer apply in order."""
    layers = decoder_layers(model)
    _check(layers, edits)
    with hold(model), ExitStack() as stack:
        for index, edit in edits.items():

            def hook(module: nn.Module, args: tuple, output: object, edit: Callable = edit) -> object:
                edited = edit(hidden_states(output))
                return edited if isinstance(output, Tensor) else (edited, *output[1:])  # older blocks: (hidden, ...)

            stack.enter_context(hooked(layers[index], hook))
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

    `start` is how many columns the cache held before, so that column `start + i` belongs to `ids[:, i]`. `cached` is
    False where nothing is kept for a later forward.
    """

    ids: Tensor | None
    mask: object
    positions: Tensor | None
    start: int
    new: int
    cached: bool = True

    @property
    def stop(self) -> int:
        return self.start + self.new


@contextmanager
def on_feed(model: PreTrainedModel, begin: Callable[[Feed], None]) -> Iterator[None]:
    """Call `begin(feed)` before every forward of the model's body. Ids are known too where the model embeds them before
    it calls its body.

    Raises:
        InputError: during a forward whose state does not say how many tokens it has seen.
    """
    body = decoder_body(model)
    keeps = "past_key_values" in inspect.signature(body.forward).parameters
    seen: list[Tensor] = []  # ids that were given to a module around the body

    def given(module: nn.Module, args: tuple, kwargs: dict) -> dict:
        return inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments

    def remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = given(module, args, kwargs).get("input_ids")
        if module is model or ids is not None:
            seen[:] = [] if ids is None else [ids]

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = given(module, args, kwargs)
        ids, embeds, cache = inputs.get("input_ids"), inputs.get("inputs_embeds"), inputs.get("past_key_values")
        if ids is None and seen and seen[0].shape == embeds.shape[:2]:
            ids = seen.pop()
        for name in ("cache_params", "state"):
            if inputs.get(name) is not None:
                raise InputError(
                    f"{type(model).__name__} keeps its state in {name}, which does not say how many tokens it has "
                    "seen; call it on whole sequences, with use_cache=False"
                )
        new = (ids if ids is not None else embeds).shape[1]
        cached = keeps and (cache is not None or inputs.get("use_cache") is not False)
        begin(Feed(ids, inputs.get("attention_mask"), inputs.get("position_ids"), held_columns(cache), new, cached))

    with hold(model), ExitStack() as stack:
        for module in {model, model.base_model} - {body}:
            stack.enter_context(hooked(module, remember, before=True, with_kwargs=True))
        stack.enter_context(hooked(body, hook, before=True, with_kwargs=True))
        yield


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
def edit_inputs(model: PreTrainedModel, edits: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replace the input x of each module of `model` by `edits[module](x)`."""
    with hold(model), ExitStack() as stack:
        for module, edit in edits.items():

            def hook(module: nn.Module, args: tuple, kwargs: dict, edit: Callable = edit) -> tuple[tuple, dict]:
                if args:
                    return (edit(args[0]), *args[1:]), kwargs
                if "hidden_states" not in kwargs:
                    raise InputError(f"{type(module).__name__} is called without hidden_states; use another model")
                return args, kwargs | {"hidden_states": edit(kwargs["hidden_states"])}

            stack.enter_context(hooked(module, hook, before=True, with_kwargs=True))
        yield


@contextmanager
def edit_outputs(model: PreTrainedModel, edits: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replace the output y of each module of `model` by `edits[module](y)`."""
    with hold(model), ExitStack() as stack:
        for module, edit in edits.items():

            def hook(module: nn.Module, args: tuple, output: Tensor, edit: Callable = edit) -> Tensor:
                return edit(output)

            stack.enter_context(hooked(module, hook))
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
    return edit_inputs(model, edits)


class Projection(NamedTuple):
    """A linear layer, and which of its outputs are the neurons: a model may fuse gate and up in one layer."""

    module: nn.Module
    outputs: slice


def down_projection(model: PreTrainedModel, layer: int) -> nn.Module:
    """The layer that writes the neurons of an MLP to the residual stream; its input is (batch, time, neurons)."""
    layers = decoder_layers(model)
    _check(layers, [layer])
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
    _check(layers, [layer])
    mlp = getattr(layers[layer], "mlp", None)
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
    return unwrapped(model.get_input_embeddings()).num_embeddings


def effective_weight(module: nn.Module, what: str) -> Tensor:
    """The weight (outputs, inputs) that a layer computes with: its own, and the LoRA adapters active on it.

    Args:
        what: the layer in words.

    Raises:
        InputError: quantised or offloaded weights, or an adapter whose change is no sum.
    """
    parts = module._modules
    if "modules_to_save" in parts:  # peft: a copy that was trained as a whole
        off = module.disable_adapters or not module.active_adapters
        module = module.original_module if off else module.modules_to_save[module.active_adapters[0]]
    elif "token_adapter" in parts:  # peft: some rows of an embedding
        module = module.token_adapter
    weight = unwrapped(module).weight.detach()
    if not weight.is_floating_point() or weight.itemsize < 2 or weight.dim() != 2:
        raise InputError(f"{what} holds quantised weights ({weight.dtype}); load the model in bfloat16 or float32")
    if weight.is_meta:
        raise InputError(f"{what} is offloaded; load the model on one device")
    if "base_layer" not in module._modules or module.disable_adapters != module.merged:
        return weight  # no adapter, or one that is off, or in the weight already
    for name in module.active_adapters:
        if module.merged or not hasattr(module, "lora_A") or name in module.lora_variant:  # such as DoRA
            raise InputError(
                f"{what} has the adapter {name!r} ({type(module).__name__}), whose change of the weight is not a sum; "
                "call merge_and_unload() first"
            )
        if name in module.scaling:
            weight = weight + module.get_delta_weight(name).detach().to(weight.dtype)
    return weight


class _Columns:
    """Which columns of each forward are edited: all, a boolean mask, or those after the prompt.

    The prompt is the first forward and whatever starts over with other tokens; a forward that feeds the same tokens
    and more (generation without a cache) goes on.
    """

    def __init__(self, positions: str | Tensor) -> None:
        if isinstance(positions, str) and positions not in ("all", "generated"):
            raise InputError(f"positions={positions!r} is not allowed; give 'all', 'generated' or a boolean mask")
        if isinstance(positions, Tensor) and positions.dtype != torch.bool:
            raise InputError(f"a mask of {positions.dtype} is not allowed; give a boolean mask of columns")
        self.positions = positions
        self.prompt: Tensor | None = None
        self.chosen: Tensor | None = None  # (batch or 1, new); None for all

    def begin(self, feed: Feed) -> None:
        columns = torch.arange(feed.start, feed.stop)
        if isinstance(self.positions, Tensor):
            mask = torch.atleast_2d(self.positions.cpu())
            known = columns < mask.shape[1]  # a mask of the prompt says nothing about what is generated
            self.chosen = mask[:, columns.clamp(max=mask.shape[1] - 1)] & known
        elif self.positions == "generated":
            if feed.ids is None:
                raise InputError("positions='generated' needs token ids, not inputs_embeds; give a mask of columns")
            if feed.start == 0 and not self._goes_on(feed.ids):
                self.prompt = feed.ids
            self.chosen = (columns >= self._held)[None]

    @property
    def _held(self) -> int:
        return 0 if self.prompt is None else self.prompt.shape[1]  # 0 also if a cache was there before the clamp

    def _goes_on(self, ids: Tensor) -> bool:
        return 0 < self._held < ids.shape[1] and torch.equal(ids[:, : self._held], self.prompt)


def clamp_neurons(
    model: PreTrainedModel,
    neurons: Mapping[int, Mapping[int, float]],
    side: Literal["product", "up"] = "product",
    positions: Literal["all", "generated"] | Tensor = "all",
):
    """Context manager: MLP neuron n of layer i has the activation `neurons[i][n]`.

    Args:
        side: what is held: "product", the input of `mlp.down_proj`, or "up", the output of the up-projection, which
            the gate still multiplies.
        positions: "all", "generated" (everything after the first forward, so the prompt reads as it is), or a boolean
            mask (columns,) or (batch, columns) of token columns, padding included.

    Raises:
        InputError: unknown layer, neuron, side or positions; no gated MLP for side "up".
    """
    if side not in ("product", "up"):
        raise InputError(f"side={side!r} is not allowed; give 'product' or 'up'")
    columns = _Columns(positions)

    def hold(values: Mapping[int, float], first: int, width: int) -> Callable[[Tensor], Tensor]:
        for neuron in values:
            if not 0 <= neuron < width:
                raise InputError(f"neuron {neuron} does not exist; this layer has neurons 0 to {width - 1}")
        where = [first + neuron for neuron in values]

        def edit(x: Tensor) -> Tensor:
            x, new = x.clone(), x.new_tensor(list(values.values()))
            chosen = columns.chosen
            x[..., where] = new if chosen is None else torch.where(chosen[..., None].to(x.device), new, x[..., where])
            return x

        return edit

    edits = {}
    for layer, values in neurons.items():
        width = down_projection(model, layer).in_features
        if side == "product":
            edits[down_projection(model, layer)] = hold(values, 0, width)
        else:
            up = gated_mlp(model, layer)["up"]
            edits[up.module] = hold(values, up.outputs.start, width)
    return _during(model, columns, edit_inputs(model, edits) if side == "product" else edit_outputs(model, edits))


@contextmanager
def _during(model: PreTrainedModel, columns: _Columns, edits: AbstractContextManager) -> Iterator[None]:
    with on_feed(model, columns.begin), edits:
        yield


@cache
def _skipping(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of what stands in for a decoder block of this kind that does not run.

    A stand-in is its block with another forward: it has the block's own attributes, weights and hooks, so that whoever
    looks for these finds them, and a hook may come and go whether the block is skipped or not.
    """

    class Skipped(kind):
        __slots__ = ("switch",)

    # Afterwards, since transformers wraps the forward of a subclass; and before what the block itself may have there.
    Skipped.forward = property(lambda self: self.switch.pass_on)
    return Skipped


def _skipped(block: nn.Module, switch: LayerSwitch) -> nn.Module:
    stand_in = object.__new__(_skipping(type(block)))
    object.__setattr__(stand_in, "__dict__", vars(block))
    object.__setattr__(stand_in, "switch", switch)
    return stand_in


class _Blocks:
    """The blocks of a model while switches are on: a layer runs where all of them let it."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers, self.whole = layers, layers._modules
        self.wanted: list[tuple[LayerSwitch, frozenset[int]]] = []

    def running(self) -> frozenset[int]:
        return frozenset.intersection(*(executed for _, executed in self.wanted))

    def exchange(self) -> None:
        """Put in the blocks that run now."""
        self.layers._modules = self.wanted[-1][0].blocks(self) if self.wanted else self.whole


class LayerSwitch:
    """Runs a model with only some of its decoder layers; the others pass their input on and do not touch the cache.

    The list of blocks is exchanged as a whole and built once for every set, so that switching costs the same for any
    number of layers. Hooks on a skipped block see its input as its output; those inside it do not fire.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.layers = model, decoder_layers(model)
        self.looked = False  # at what blocks return; before one has run that is not known
        self.rest: tuple[None, ...] | None = None  # what stands behind the hidden states, if they do not come alone
        self.lists: dict[frozenset[int], dict[str, nn.Module]] = {}

    @contextmanager
    def only(self, executed: frozenset[int]) -> Iterator[None]:
        """Only the layers in `executed` run inside, and of them those that other switches let run."""
        _check(self.layers, executed)
        self.pass_on = owned(self._pass_on)
        with hold(self.model) as held, held.shared("layers", lambda: nullcontext(_Blocks(self.layers))) as blocks:
            record = (self, executed)
            blocks.wanted.append(record)
            try:
                blocks.exchange()
                with self._watched(blocks):
                    yield
            finally:
                blocks.wanted = [other for other in blocks.wanted if other is not record]
                blocks.exchange()

    def blocks(self, all_blocks: _Blocks) -> dict[str, nn.Module]:
        """The list of blocks in which those that do not run have stand-ins."""
        running = all_blocks.running()
        if running not in self.lists:
            self.lists[running] = {
                name: block if int(name) in running else _skipped(block, self)
                for name, block in all_blocks.whole.items()
            }
        return self.lists[running]

    def _pass_on(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor]:
        return hidden_states if self.rest is None else (hidden_states, *self.rest)

    def _watched(self, blocks: _Blocks) -> AbstractContextManager[None]:
        running = blocks.running()
        if self.looked or not running:
            return nullcontext()
        return hooked(blocks.whole[str(min(running))], self._look)

    def _look(self, module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        hidden_states(output)
        rest = () if isinstance(output, Tensor) else output[1:]
        self.looked, self.rest = True, None if isinstance(output, Tensor) else (None,) * len(rest)
        if any(part is not None and not _is_attention(part) for part in rest):
            raise InputError(
                "the layers of this model hand more than hidden states on to the next one, so none can be skipped; "
                "use another model"
            )


def _is_attention(part: object) -> bool:
    """Whether a block returns this for its user alone: attention weights (batch, heads, queries, keys)."""
    return isinstance(part, Tensor) and part.dim() == 4


def skip_layers(model: PreTrainedModel, executed: Collection[int]) -> AbstractContextManager[None]:
    """Context manager: only the decoder layers in `executed` run, see `LayerSwitch`."""
    return LayerSwitch(model).only(frozenset(executed))


@contextmanager
def mask_layers(model: PreTrainedModel, mask: Tensor) -> Iterator[None]:
    """Where `mask` is False a column does not run a layer: it leaves the layer as it came.

    Every layer still computes all columns, so this is no faster; it is how a model is trained for skipping.

    Args:
        mask: boolean (layers, columns) or (layers, batch, columns).
    """
    layers = decoder_layers(model)
    if mask.dtype != torch.bool or mask.dim() not in (2, 3) or mask.shape[0] != len(layers):
        raise InputError(
            f"a mask {tuple(mask.shape)} of {mask.dtype} is not allowed; give a boolean one of ({len(layers)} layers, "
            "columns) or (layers, batch, columns)"
        )

    def hook(keep: Tensor) -> Callable:
        def mix(module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
            before, after = args[0] if args else kwargs["hidden_states"], hidden_states(output)
            if keep.shape[-2] != after.shape[1]:
                raise InputError(f"the mask has {keep.shape[-2]} columns, the text {after.shape[1]}; give one for each")
            after = torch.where(keep.to(after.device), after, before)
            return after if isinstance(output, Tensor) else (after, *output[1:])

        return mix

    everywhere = mask.flatten(1).all(1).tolist()
    with hold(model), ExitStack() as stack:
        for layer, keep, whole in zip(layers, mask[..., None], everywhere):
            if not whole:
                stack.enter_context(hooked(layer, hook(keep), with_kwargs=True))
        yield


def fingerprint(model: PreTrainedModel) -> str:
    """A short hash of the architecture and a sample of every weight: artifacts are bound to it."""
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
