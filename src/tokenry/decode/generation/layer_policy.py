"""Which decoder layers run for a column, and what that leaves in the cache."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Protocol

from transformers import PreTrainedModel

from ...core.errors import InputError
from ...hooks.layers import LayerSwitch
from ...models.anatomy import decoder_layers

__all__ = ["ExecutedLayers", "LayerPolicy", "layers_needed"]


class LayerPolicy(Protocol):
    """Which decoder layers run, as a function of the column alone. Sets only shrink and contain layer 0.

    Then every layer has seen all earlier columns of those that it runs for, and the cache needs no repair.
    """

    def begin(self, prompt_columns: int, new_columns: int | None) -> None:
        """Called once, before the prompt is fed, with the most columns that may follow it (None: not known)."""

    def layers(self, column: int) -> Collection[int]:
        """The layers executed for this column; the whole prompt runs those of its last column."""
        ...


def layers_needed(model: PreTrainedModel) -> frozenset[int]:
    """The layers that may never be skipped: masks and positions are sized from the first one of every attention kind.

    Raises:
        InputError: a later layer reads the keys and values of an earlier one, which skipping would leave without.
    """
    config = model.config.get_text_config()
    if getattr(config, "num_kv_shared_layers", 0):
        raise InputError(
            f"{config.num_kv_shared_layers} layers of {type(model).__name__} share keys and values, so none can be "
            "skipped; use a model without shared layers"
        )
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return frozenset(kinds.index(kind) for kind in set(kinds))


class ExecutedLayers:
    """A policy at work on a model: its sets are checked, and remembered as long as their columns are in the cache."""

    def __init__(self, model: PreTrainedModel, policy: LayerPolicy) -> None:
        self.policy, self.switch = policy, LayerSwitch(model)
        self.depth, self.needed = len(decoder_layers(model)), layers_needed(model)
        self.by_column: dict[int, frozenset[int]] = {}

    def running(self, column: int) -> AbstractContextManager:
        """Only the layers of this column run.

        Raises:
            InputError: a layer is missing that is always needed, or one comes back that was left out before.
        """
        wanted, before = self.policy.layers(column), self.by_column.get(column - 1)
        # mostly it is the same set as before, and needs no check
        executed = before if before is not None and before is wanted else self._checked(frozenset(wanted), before)
        self.by_column[column] = executed
        return self.switch.only(executed)

    def take_back(self, columns: range, layers: int) -> list[int]:
        """Forget these columns; returns how many of them each of the `layers` of the cache holds."""
        gone = [self.by_column.pop(column, None) for column in columns]
        return [sum(ran is None or i in ran for ran in gone) for i in range(layers)]

    def _checked(self, executed: frozenset[int], before: frozenset[int] | None) -> frozenset[int]:
        if not self.needed <= executed <= set(range(self.depth)):
            always = ", ".join(map(str, sorted(self.needed)))
            raise InputError(
                f"the layer policy runs {sorted(executed)} of {self.depth} layers; layer {always} is always needed"
            )
        if before is not None and not executed <= before:
            raise InputError(f"the layer policy adds layers {sorted(executed - before)} back; sets may only shrink")
        return executed
