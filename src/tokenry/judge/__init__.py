"""judge: what is an answer worth?"""

from ..lazy import exports

_HOMES = {
    "CRew": "crew",
    "CRewScorer": "crew",
    "Judged": "crew",
    "Reference": "slop",
    "SlopProfile": "slop",
    "Solution": "crew",
    "best_of_n": "choice",
    "build_crew_pairs": "choice",
    "crew_dpo_config": "choice",
    "crew_reward": "choice",
    "find_answer": "answers",
    "human_reference": "slop",
    "lowest_correct": "choice",
    "normalise_answer": "answers",
    "weighted_vote": "choice",
}
__all__ = sorted(_HOMES)
__getattr__ = exports(__name__, _HOMES)
