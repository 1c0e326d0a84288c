"""judge: what is an answer worth?"""

from ..lazy import exports

_HOMES = {
    "CRew": "crew",
    "CRewScorer": "crew",
    "Judged": "crew",
    "Reference": "slop",
    "SlopProfile": "slop",
    "Solution": "crew",
    "best_of_n": "crew",
    "build_crew_pairs": "crew",
    "crew_dpo_config": "crew",
    "crew_reward": "crew",
    "find_answer": "answers",
    "human_reference": "slop",
    "lowest_correct": "crew",
    "normalise_answer": "answers",
    "weighted_vote": "crew",
}
__all__ = sorted(_HOMES)
__getattr__ = exports(__name__, _HOMES)
