"""Models of one shape whose blocks are drawn together: soft parameter sharing.

Paper: CodeFill, arXiv 2202.06689. The loss of a task is that of its own model, plus the squared distance of its blocks
to those of the others; embeddings and output layers are each model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...core.errors import InputError
from ...core.fields import Weight, check
from ...models.anatomy import decoder_layers

__all__ = ["SoftSharedLM"]


class SoftSharedLM(PreTrainedModel):
    """Causal models, one for each task, with the penalty that ties them.

    Args:
        models: {task: its model}; vocabularies may differ, the blocks may not.
        share_weight: of the penalty; None is set by `weigh`.

    Raises:
        InputError: fewer than one model, blocks of different shapes, or a weight that is no number >= 0.
    """

    config_class = PreTrainedConfig
    _supports_sdpa = True  # the models inside have their own ways to attend

    def __init__(self, models: Mapping[str, PreTrainedModel], share_weight: float | None = None) -> None:
        if not models:
            raise InputError("there is no model to train; give at least one task")
        if share_weight is not None:
            check("share_weight", share_weight, Weight)
        super().__init__(PreTrainedConfig())
        self.models = nn.ModuleDict(dict(models))
        self.share_weight = share_weight
        shapes = {task: [tuple(p.shape) for p in self.blocks(task)] for task in models}
        first = next(iter(shapes))
        for task, found in shapes.items():
            if found != shapes[first]:
                raise InputError(
                    f"the blocks of {task!r} have other shapes than those of {first!r}; build both models with the "
                    "same layers and width"
                )

    def forward(self, task: str, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        """What the model of a task gives; its loss is the mean over labels that are not -100."""
        return self.models[task](input_ids=input_ids, labels=labels)

    def blocks(self, task: str) -> list[nn.Parameter]:
        """The parameters that are shared, in an order that is the same for all models."""
        return list(decoder_layers(cast(PreTrainedModel, self.models[task])).parameters())

    def distance(self, task: str) -> Tensor:
        """The squared distance of a model's blocks to those of all others, summed. Its gradient reaches both sides."""
        own = self.blocks(task)
        parts = [
            (mine - theirs).square().sum()
            for other in self.models
            if other != task
            for mine, theirs in zip(own, self.blocks(other))
            if mine is not theirs
        ]
        return torch.stack(parts).sum() if parts else own[0].new_zeros(())

    def penalty(self, task: str) -> Tensor:
        """What is added to the loss of a task. Without a weight no other model has a gradient, not even one of zero,
        which would let an optimizer move it by what it remembers."""
        if not self.share_weight:
            return self.blocks(task)[0].new_zeros(())
        return self.share_weight * self.distance(task)

    @torch.no_grad()
    def weigh(self, task: str, loss: Tensor, share: float = 0.1) -> None:
        """Set a weight that is not given, so that the penalty is now a tenth of this loss."""
        if self.share_weight is None:
            distance = float(self.distance(task))
            self.share_weight = share * float(loss) / distance if distance else 0.0

    def export(self, task: str = "tvp") -> PreTrainedModel:
        """The plain causal model of a task."""
        if task not in self.models:
            raise InputError(f"there is no task {task!r}; give one of {', '.join(self.models)}")
        return cast(PreTrainedModel, self.models[task])
