"""Do neurons that are named after a token move that token more than other neurons do?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..measure.claims import Contrast, Finding, above, at_least
from ..measure.compare import Comparison
from ..measure.experiment import Design, Run, experiment
from ..measure.statistics import bootstrap_statistic
from ..measure.task import Arm, Statistic
from ..measure.tasks.clamp import PROMPTS, ClampTask, named_neurons
from ..models.anatomy import decoder_layers
from ..read.lm_head_neurons import LMHeadNeurons

__all__ = ["build"]

PLAIN, RANDOM, OTHER, METHOD = (
    "named neuron at its own value",
    "random neuron, same token",
    "named neuron, other token",
    "named neuron, its token",
)
LAST = 3  # layers: named neurons live in the last ones
VALUE = 20.0


@experiment("lm-head-neurons", LMHeadNeurons, samples=60, seeds=range(len(PROMPTS)), batch=12, quick=4)
def build(run: Run[LMHeadNeurons]) -> Design:
    """Clamps at +-20 on the neurons of the last three layers whose names stand out most; a seed is a prompt, samples
    are named neurons, the layers in turns.

    `method` has side and norm that name the neurons; the clamp always holds the up-projection.
    """
    method = run.method or LMHeadNeurons()
    depth = len(decoder_layers(run.model))
    layers = range(max(0, depth - LAST), depth)
    named = named_neurons(run.model, layers, run.count, method)
    task = ClampTask(run.model, run.tokenizer, named, VALUE)
    setting = {"value": VALUE, **method.model_dump(mode="json", include={"side", "fold_norm"})}
    return Design(
        task=task,
        arms=[
            Arm(PLAIN, role="plain", setting=setting),
            Arm(RANDOM, role="control", setting=setting, apply=task.random_neuron),
            Arm(OTHER, role="control", setting=setting, apply=task.other_token),
            Arm(METHOD, setting=setting, apply=task.own_token),
        ],
        baseline=RANDOM,
        statistics=(
            Statistic(
                "correlation",
                "higher",
                "correlation over neurons and prompts of the slope with its first-order prediction",
                correlation,
            ),
        ),
        notes="A random neuron is drawn for each prompt from the layer of the named one. The other token is that of "
        "another named neuron. The sign of an effect is not claimed: the gate may turn it round.",
    )


def correlation(values: Mapping[str, np.ndarray]) -> float:
    """Correlation of slope and first_order; NaN when either is constant."""
    slope, predicted = values["slope"], values["first_order"]
    known = ~np.isnan(slope + predicted)
    if slope[known].std() < 1e-4 or predicted[known].std() == 0:  # the slope at its own value is rounding only
        return float("nan")
    return float(np.corrcoef(slope[known], predicted[known])[0, 1])


def effect_ratio(c: Comparison, second: str, layer: int | None = None) -> Contrast:
    """Mean effect of the method over that of a control, of one layer or all, resampled over neurons."""
    chosen = np.array([layer in (None, s.data["target"].layer) for s in c.samples])
    a, b = (c.values(s, "effect")[chosen] for s in (METHOD, second))
    found = bootstrap_statistic(lambda pick: a[pick].mean() / b[pick].mean(), int(chosen.sum()))
    return Contrast(found, f"effect, own / {second}" if layer is None else f"layer {layer}", ".2f")


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """The claim, the control for neurons that move everything, the first order."""
    layers = sorted({s.data["target"].layer for s in c.samples})
    means = ", ".join(f"{s} {c.mean(s, 'effect'):.2f}" for s in (METHOD, RANDOM, OTHER))
    return [
        Finding(
            "Clamping a named neuron moves its token at least 1.5 times as much as clamping a random neuron of its "
            "layer does.",
            at_least(effect_ratio(c, RANDOM), 1.5),
            main=True,
            note=f"nats: {means}; " + "; ".join(str(effect_ratio(c, RANDOM, layer)) for layer in layers),
        ),
        Finding(
            "It is its own token that a named neuron moves: the tokens of other named neurons move less.",
            above(effect_ratio(c, OTHER), 1),
        ),
        Finding(
            "The effect follows value * act(gate) * (unembedding row . down column): its correlation is positive.",
            above(c.value("correlation", METHOD, ".2f"), 0),
        ),
    ]
