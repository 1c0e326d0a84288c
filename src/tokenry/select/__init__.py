"""select: which tokens are kept?"""

from ..lazy import exports

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
__getattr__ = exports(__name__, _HOMES)
