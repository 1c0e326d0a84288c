"""Inside a forward: watch and edit the residual stream, heads, and what goes into and out of modules. As all hooks,
these are context managers that nest, may end in any order, and leave nothing behind, also after an error. Each belongs
to the thread that entered it; meanwhile another thread is refused the model (see `holding`).

Layers are numbered as decoder blocks; a block's output has shape (batch, time, width) and comes before any final
norm. (A `Trace` counts the states between the blocks: its `resid[i + 1]` is the output of block i.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import InputError
from ..models.anatomy import check_layers, decoder_body, decoder_layers, head_mixer, hidden_states
from ..models.kv_cache import held_columns
from .holding import hold, hooked

__all__ = [
    "Feed",
    "ablate_heads",
    "add_to_residual",
    "capture_residual",
    "edit_outputs",
    "edit_residual",
    "on_feed",
    "patch_resid",
]


@contextmanager
def edit_residual(model: PreTrainedModel, edits: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replace the output h of layer i by `edits[i](h)`. Nests; several edits of a layer apply in order."""
    layers = decoder_layers(model)
    check_layers(layers, edits)
    with hold(model), ExitStack() as stack:
        for index, edit in edits.items():

            def hook(module: nn.Module, args: tuple, output: Tensor | tuple, edit: Callable = edit) -> Tensor | tuple:
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
        ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
        embeds = cast(Tensor, inputs.get("inputs_embeds"))  # given where ids are not
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


def ablate_heads(
    model: PreTrainedModel,
    heads: Mapping[int, Sequence[int]],
    alpha: float = 0.0,
    renormalise: Literal["none", "token", "global"] = "none",
):
    """Context manager: the heads `heads[layer]` write only `alpha` times what they would to the residual stream.

    Args:
        alpha: 0 silences them, 1 changes nothing.
        renormalise: stretch what all heads of the layer give to the length that it had before, of each token or of the
            whole batch at once; the latter depends on what else is in the batch, padding too.

    Raises:
        InputError: no such layer or head, alpha outside 0 to 1, another way to renormalise.
    """
    if not 0 <= alpha <= 1 or renormalise not in ("none", "token", "global"):
        raise InputError(
            f"alpha={alpha}, renormalise={renormalise!r} is not allowed; give alpha in [0, 1], and "
            "none, token or global"
        )

    def scale(head_dim: int, layer: int, chosen: Sequence[int], count: int) -> Callable[[Tensor], Tensor]:
        for head in chosen:
            if not 0 <= head < count:
                raise InputError(f"head {head} does not exist; layer {layer} has heads 0 to {count - 1}")

        def edit(x: Tensor) -> Tensor:
            split = x.unflatten(-1, (count, head_dim)).clone()
            split[..., list(chosen), :] *= alpha
            return _stretched(split.flatten(-2), x, renormalise)

        return edit

    edits = {}
    for layer, chosen in heads.items():
        mixer, head_dim = head_mixer(model, layer)
        edits[mixer] = scale(head_dim, layer, chosen, cast(int, mixer.in_features) // head_dim)
    return edit_inputs(model, edits)


def _stretched(new: Tensor, old: Tensor, renormalise: str) -> Tensor:
    """`new` (batch, time, width) with the length of `old`; what is 0 stays so."""
    if renormalise == "none":
        return new
    over = {"dim": -1, "keepdim": True} if renormalise == "token" else {}
    before, after = old.float().norm(**over), new.float().norm(**over)
    return new * torch.where(after > 0, before / after, 1.0).to(new.dtype)
