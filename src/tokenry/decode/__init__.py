"""decode: which token comes next?"""

from ..lazy import exports

_HOMES = {
    "Antislop": "antislop",
    "NGramBan": "antislop",
    "PhraseBan": "antislop",
    "RegexBan": "antislop",
    "BudgetForcing": "budget_forcing",
    "BudgetForcingMonitor": "budget_forcing",
    "CyclicReflectionLogitsProcessor": "cyclicreflex",
    "CyclicReflex": "cyclicreflex",
    "Rectification": "rectification",
    "RectifierLogitsProcessor": "rectification",
    "cap_distribution": "rectification",
    "DiffAdapt": "diffadapt",
    "Strategy": "diffadapt",
    "SkipDecode": "skipdecode",
    "SkipSchedule": "skipdecode",
    "skip_forward": "skipdecode",
    "DigitScorer": "specreason",
    "SpecReason": "specreason",
    "SpeculativeReasoner": "specreason",
    "StepPrompts": "step_models",
    "step_speedup": "specreason",
    "ThoughtSwitchPenalty": "tip",
    "ThoughtSwitchPenaltyLogitsProcessor": "tip",
    "reflection_token_ids": "thinking",
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
