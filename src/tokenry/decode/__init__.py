"""decode: which token comes next?"""

from ..lazy import exports

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
__getattr__ = exports(__name__, _HOMES)
