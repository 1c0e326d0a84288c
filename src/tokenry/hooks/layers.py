"""Run a model with some of its layers, or with some layers for each column."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import InputError
from ..models.anatomy import check_layers, decoder_layers, hidden_states
from .holding import hold, hooked, owned

__all__ = ["LayerSwitch", "mask_layers", "skip_layers"]


@cache
def _skipping(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of what stands in for a decoder block of this kind that does not run.

    A stand-in is its block with another forward: it has the block's own attributes, weights and hooks, so that whoever
    looks for these finds them, and a hook may come and go whether the block is skipped or not.
    """

    class Skipped(kind):
        __slots__ = ("switch",)

    # Afterwards, since transformers wraps the forward of a subclass; and before what the block itself may have there.
    Skipped.forward = property(lambda self: self.switch.pass_on)  # pyright: ignore[reportAttributeAccessIssue]
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
        check_layers(self.layers, executed)
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

    def _pass_on(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor | tuple:
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

    A layer that any column runs computes all of them, so only what no column runs saves time; it is how a model is
    trained for skipping.

    Args:
        mask: boolean (layers, columns) or (layers, batch, columns).
    """
    layers = list(decoder_layers(model))
    if mask.dtype != torch.bool or mask.dim() not in (2, 3) or mask.shape[0] != len(layers):
        raise InputError(
            f"a mask {tuple(mask.shape)} of {mask.dtype} is not allowed; give a boolean one of ({len(layers)} layers, "
            "columns) or (layers, batch, columns)"
        )

    def hook(keep: Tensor) -> Callable:
        def mix(module: nn.Module, args: tuple, kwargs: dict, output: Tensor | tuple) -> Tensor | tuple:
            before, after = args[0] if args else kwargs["hidden_states"], hidden_states(output)
            if keep.shape[-2] != after.shape[1]:
                raise InputError(f"the mask has {keep.shape[-2]} columns, the text {after.shape[1]}; give one for each")
            after = torch.where(keep.to(after.device), after, before)
            return after if isinstance(output, Tensor) else (after, *output[1:])

        return mix

    columns = mask.flatten(1)
    running, whole = columns.any(1).tolist(), columns.all(1).tolist()
    executed = [i for i, runs in enumerate(running) if runs]
    with hold(model), ExitStack() as stack:
        stack.enter_context(skip_layers(model, executed))
        for i in executed:
            if not whole[i] or i == executed[0]:  # the first one counts the columns, whatever it runs
                stack.enter_context(hooked(layers[i], hook(mask[i, ..., None]), with_kwargs=True))
        yield
