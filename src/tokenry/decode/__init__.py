"""decode: which token comes next?"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Antislop": "antislop",
    "NGramBan": "antislop",
    "PhraseBan": "antislop",
    "RegexBan": "antislop",
    "BudgetForcing": "cyclicreflex",
    "BudgetForcingMonitor": "cyclicreflex",
    "CyclicReflectionLogitsProcessor": "cyclicreflex",
    "CyclicReflex": "cyclicreflex",
    "ThoughtSwitchPenalty": "cyclicreflex",
    "ThoughtSwitchPenaltyLogitsProcessor": "cyclicreflex",
    "reflection_token_ids": "cyclicreflex",
    "triangular_wave": "cyclicreflex",
    "TransformersEngine": "engine",
    "encode_prompts": "api",
    "generate": "api",
    "loop": "api",
    "DecodeLoop": "core",
    "DecodeOutput": "core",
    "RewindEvent": "core",
    "Row": "core",
    "Violation": "core",
    "DecodeMethod": "method",
    "Plugins": "method",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module 'tokenry.decode' has no attribute {name!r}")
