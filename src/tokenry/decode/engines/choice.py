"""Which engines run a model: the one place that knows."""

from __future__ import annotations

from typing import Any

from transformers import Cache, PreTrainedModel

from ...models.kv_cache import held_columns
from ...models.llamacpp.model import LlamaCppModel
from ..generation.engine import TransformersEngine, TreeEngine
from ..generation.plugins import NO_PLUGINS, Plugins
from .llamacpp import LlamaCppEngine, SharedSequences
from .shared import SharedEngine, SharedTransformersEngine, sharing_obstacle

__all__ = ["open_engine", "open_shared"]


def open_engine(
    model: PreTrainedModel,
    plugins: Plugins = NO_PLUGINS,
    rewinds: bool = True,
    cache: Cache | None = None,
    rewind: str = "auto",
    extra: dict[str, Any] | None = None,
    max_new_tokens: int | None = None,
) -> TreeEngine:
    """An engine for one generation; the arguments are those of `TransformersEngine`.

    Raises:
        InputError: something that llama.cpp, which gives logits alone, cannot do.
    """
    if not isinstance(model, LlamaCppModel):
        return TransformersEngine(model, cache, plugins.layer_policy, rewinds, rewind, extra, max_new_tokens)
    inside = {
        "a layer policy": plugins.layer_policy is not None,
        "an intervention": bool(plugins.interventions),
        "a cache of torch": cache is not None and held_columns(cache) > 0,
        f"rewind={rewind!r}": rewind != "auto",
    } | {name: value is not None for name, value in (extra or {}).items()}
    for what in (name for name, given in inside.items() if given):
        raise model.refusal(what)
    return LlamaCppEngine(model, max_new_tokens)


def open_shared(model: PreTrainedModel, texts: int, memory: int = 0) -> SharedEngine | None:
    """An engine that so many texts can share; None where each needs one of its own.

    Args:
        memory: bytes that texts may take that are over, so that others need not read what they have in common with
            them; 0: every prompt is read anew.
    """
    if isinstance(model, LlamaCppModel):
        return SharedSequences(model, texts, memory)
    return None if sharing_obstacle(model) else SharedTransformersEngine(model, memory)
