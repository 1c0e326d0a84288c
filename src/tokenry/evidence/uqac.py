"""Is the confidence along the attention chain better calibrated than that of the answer alone, and does it tell more?

The reasoner of the zoo solves problems greedily; each score says of the same answers how likely they are right.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..data.problems import Arithmetic, draw_problems
from ..measure.claims import Finding, above, all_of, below, describe, loses_at_most
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.task import Arm
from ..measure.tasks.confidence import DRAWN, ConfidenceTask
from ..read.uqac import UQAC
from ..zoo.reasoner import LEVELS

__all__ = ["build"]

ANSWER, WHOLE, MEAN = "answer alone", "whole solution", "mean log-probability"
LENGTH, RANDOM = "length", "random positions"
VOTE, METHOD = f"agreement of {DRAWN} samples", "uqac"
SCORES = {ANSWER: "answer", WHOLE: "whole", MEAN: "mean", LENGTH: "length", RANDOM: "random", VOTE: "samples"}


@experiment("uqac", UQAC, model="zoo/reasoner", samples=480, batch=60, quick=8, limit=1800)
def build(run: Run[UQAC]) -> Design:
    """Scores of the same greedy answers to problems of all levels."""
    method = run.settings(UQAC)
    problems = draw_problems(Arithmetic(), run.count, levels=LEVELS)
    return Design(
        task=ConfidenceTask(run.model, run.tokenizer, Arithmetic(), problems, method),
        arms=[
            *(Arm(name, role="plain" if name == ANSWER else "control", apply=how) for name, how in SCORES.items()),
            Arm(METHOD, method, apply="uqac"),
        ],
        baseline=ANSWER,
        statistics=ConfidenceTask.statistics,
        notes="Costs are those beyond the solution. A length is no probability and has no calibration error. Random "
        "positions are as many as the chain keeps, with the same variations; their cost has that of the walk in it.",
        tried="On dev, with the settings of the paper and no others: 120 problems of all 8 levels, then 120 of the "
        "levels 1 to 6, then 400 of all 8, without samples. There the calibration error of uqac was .155 (answer alone "
        ".346, mean log-probability .315) and its AUROC .732 (.589, .952); on the 300 of levels 1 to 6 it was .065 "
        "(.129, .105) and .625 (.619, .915). The model solves nothing of levels 7 and 8, so that telling these levels "
        "from the others would be most of the AUROC; they were left out. A run of 8 test problems, to see that all "
        "works, changed nothing. For time, 900 problems were cut to 480 before any result of them was seen.",
    )


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """Calibration and discernment against the answer alone, then against each control; the vote with its cost."""
    calibration, discernment = (c.gap(name, METHOD, ANSWER) for name in ("ece", "auroc"))
    fed = c.ratio("tokens_processed", VOTE, METHOD)
    return [
        Finding(
            "It is better calibrated than the probability of the answer alone, and tells right from wrong hardly less.",
            all_of(below(calibration, 0), loses_at_most(discernment, 0.05)),
            main=True,
            note=_listed(c, "ece", (METHOD, ANSWER)) + "; " + _listed(c, "auroc", (METHOD, ANSWER)),
        ),
        Finding(
            "It matters which tokens are kept: as many random ones are calibrated worse and tell less.",
            all_of(below(c.gap("ece", METHOD, RANDOM), 0), above(c.gap("auroc", METHOD, RANDOM), 0)),
        ),
        Finding(
            "It is better calibrated than the probability of the whole solution and than its mean.",
            beats(c, "ece", METHOD, [WHOLE, MEAN]),
            note=_listed(c, "ece", (WHOLE, MEAN)),
        ),
        Finding(
            "It tells right from wrong better than the whole solution, its mean, and its length.",
            beats(c, "auroc", METHOD, [WHOLE, MEAN, LENGTH]),
            note=_listed(c, "auroc", (WHOLE, MEAN, LENGTH)),
        ),
        describe(
            f"What the {VOTE} give, and at which cost.",
            f"{_listed(c, 'ece', (VOTE,))}; {_listed(c, 'auroc', (VOTE,))}; {c.mean(VOTE, 'tokens'):.0f} tokens more "
            f"are generated, and {fed.shown} times as many are fed to the model as by {METHOD}",
        ),
    ]


def _listed(c: Comparison, name: str, arms: Sequence[str]) -> str:
    return f"{name}: " + ", ".join(f"{arm} {c.mean(arm, name):.3f}" for arm in arms)
