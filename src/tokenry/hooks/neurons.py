"""Hold MLP neurons at chosen activations inside a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.errors import InputError
from ..models.anatomy import down_projection, gated_mlp
from .residual import Feed, edit_inputs, edit_outputs, on_feed

__all__ = ["clamp_neurons"]


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
        if self.prompt is None or not 0 < self._held < ids.shape[1]:
            return False
        return torch.equal(ids[:, : self._held], self.prompt)


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
        width = cast(int, down_projection(model, layer).in_features)
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
