"""select: which tokens are kept?"""

from importlib import import_module
from typing import Any

_HOMES = {
    "CompressKV": "compresskv",
    "CompressKVPress": "kvpress",
    "identify_retrieval_heads": "compresskv",
    "layer_eviction_error": "compresskv",
    "HeadProfile": "profile",
    "NeedlePrompt": "calibrate",
    "calibrate_model": "calibrate",
    "make_needle_prompts": "calibrate",
    "CacheCutter": "core",
    "FirstLast": "core",
    "KeepMap": "core",
    "LayerView": "core",
    "LowestScore": "core",
    "PerLayerMask": "core",
    "Random": "core",
    "TokenScorer": "core",
    "UniformStride": "core",
    "allocate_layer_budgets": "scores",
    "allocate_proportional": "scores",
    "find_answer_span": "scores",
    "keep_topk": "scores",
    "semantic_retrieval_scores": "scores",
    "stage_counts": "scores",
    "window_scores": "scores",
    "SelectMethod": "method",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'tokenry.select' has no attribute {name!r}")
