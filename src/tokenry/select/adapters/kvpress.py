"""CompressKV as a press of NVIDIA's kvpress.

    from tokenry.select.adapters.kvpress import CompressKVPress
    with CompressKVPress(profile="profile.json", budget=256)(model):
        model.generate(**inputs)

kvpress 0.5.5 needs transformers < 5.3 and the rest of tokenry needs 5.20, so one environment holds only one of them.
This file and what it imports therefore use nothing newer than transformers 5.2; put tokenry's `src` on PYTHONPATH.
Checked with kvpress 0.5.5, transformers 5.2.0, torch 2.15, sdpa, batch 1:

    python -m venv /tmp/venv-kvpress
    /tmp/venv-kvpress/bin/pip install kvpress==0.5.5 'transformers<5.3' pytest pytest-timeout pydantic
    PYTHONPATH=src /tmp/venv-kvpress/bin/python -m pytest tests/test_kvpress.py -rs

Layers of unequal length have no mask of their own there: with `adaptive=True` run one prompt at a time, without
padding. tokenry's own `CompressKV` has no such limit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import ScorerPress
from kvpress.utils import get_prerope_query_states
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from ...core.errors import InputError
from ..heads.profile import HeadProfile
from ..keep.topk import allocate_layer_budgets, keep_topk, window_scores

__all__ = ["CompressKVPress"]


@dataclass
class CompressKVPress(ScorerPress):
    """Keep `budget` entries per layer on average, chosen by the layer's semantic retrieval heads.

    Args:
        profile: a HeadProfile or the path of one, made for the model.
        budget: cache entries per layer, mean over layers; `compression_ratio` is not used.
        window_size, kernel_size, top_heads, adaptive, min_tokens, max_factor: see `tokenry.select.CompressKV`.

    Raises:
        InputError: a profile of another model or without layer errors when adaptive, a budget not above the window.
    """

    profile: HeadProfile | str | None = None
    budget: int = 256
    window_size: int = 8
    kernel_size: int = 5
    top_heads: int = 4
    adaptive: bool = True
    min_tokens: int = 12
    max_factor: float = 3.0
    budgets: list[int] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile is None:
            raise InputError("CompressKVPress needs profile=..., a HeadProfile or the path of one")
        self.profile = HeadProfile.opened(self.profile)
        least = self.min_tokens if self.adaptive else self.budget
        if not self.window_size < least <= self.budget:
            raise InputError(
                f"budget={self.budget} and min_tokens={self.min_tokens} must be above window_size={self.window_size}, "
                "and min_tokens at most the budget"
            )

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Check the profile against the model and split the budget over its layers."""
        self.profile.check(model)
        layers = self.profile.layers
        if not self.adaptive:
            self.budgets = [self.budget] * layers
            return
        if self.profile.error is None:
            raise InputError("the head profile has no layer errors; measure them or give adaptive=False")
        most = int(self.max_factor * self.budget)
        self.budgets = allocate_layer_budgets(self.profile.error, self.budget * layers, self.min_tokens, most)

    def score(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> Tensor:
        """(batch, kv_heads, T), the same for every key-value head; the window stands above everything."""
        w = self.window_size
        cos, sin = (t[:, -w:].unsqueeze(1) for t in kwargs["position_embeddings"])
        queries = get_prerope_query_states(module, hidden_states[:, -w:])
        queries = queries * cos + rotate_half(queries) * sin
        heads = self.profile.order[module.layer_idx][: self.top_heads]
        scores = window_scores(queries, keys, heads, self.kernel_size, module.scaling)
        window = (scores.amax(-1, keepdim=True) + 1).expand(-1, w)
        return torch.cat([scores, window], -1)[:, None].expand(-1, keys.shape[1], -1)

    def compress(
        self,
        module: nn.Module,
        hidden_states: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Keep this layer's own number of entries instead of a ratio."""
        budget = self.budgets[module.layer_idx]
        if budget >= keys.shape[2]:
            return keys, values
        scores = self.score(module, hidden_states, keys, values, attentions, kwargs)
        index = keep_topk(scores, budget)[..., None]
        return (
            keys.gather(2, index.expand(-1, -1, -1, keys.shape[-1])),
            values.gather(2, index.expand(-1, -1, -1, values.shape[-1])),
        )
