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
    "GreedyDraftVerifier": "verifiers",
    "KSeqVerifier": "verifiers",
    "NaiveVerifier": "verifiers",
    "RecursiveRejectionVerifier": "verifiers",
    "Selection": "verifiers",
    "SingleDraftVerifier": "verifiers",
    "VERIFIERS": "verifiers",
    "kseq_acceptance_probability": "verifiers",
    "kseq_division_factor": "verifiers",
    "kseq_residual": "verifiers",
    "sample_drafts": "verifiers",
}
__all__ = sorted(_HOMES)
__getattr__ = exports(__name__, _HOMES)
