"""Do neurons that are named after a token move that token more than other neurons do?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..measure.compare import Comparison
from ..measure.statistics import Interval, bootstrap_statistic
from ..measure.task import Experiment, Finding, Statistic, Subject
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


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    method: LMHeadNeurons | None = None,
) -> Experiment:
    """Clamps at +-20 on the neurons of the last three layers whose names stand out most; a seed is a prompt.

    Args:
        samples: how many named neurons, the layers in turns.
        method: side and norm that name the neurons; the clamp always holds the up-projection.
    """
    method = method or LMHeadNeurons()
    depth = len(decoder_layers(model))
    layers = range(max(0, depth - LAST), depth)
    task = ClampTask(model, tokenizer, named_neurons(model, layers, samples or 60, method), VALUE)
    setting = {"value": VALUE, **method.model_dump(mode="json", include={"side", "fold_norm"})}
    return Experiment(
        slug=LMHeadNeurons.slug,
        claim=LMHeadNeurons.claim,
        task=task,
        subjects=[
            Subject(PLAIN, "plain", setting),
            Subject(RANDOM, "control", setting, task.random_neuron),
            Subject(OTHER, "control", setting, task.other_token),
            Subject(METHOD, "method", setting, task.own_token),
        ],
        baseline=RANDOM,
        judge=judge,
        seeds=tuple(seeds or range(len(PROMPTS))),
        batch=12,
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


def effect_ratio(comparison: Comparison, first: str, second: str, layer: int | None = None) -> Interval:
    """Mean effect of `first` over that of `second`, of one layer or all, resampled over neurons."""
    chosen = np.array([layer in (None, s.data["target"].layer) for s in comparison.samples])
    a, b = (comparison.values(s, "effect")[chosen] for s in (first, second))
    return bootstrap_statistic(lambda pick: a[pick].mean() / b[pick].mean(), int(chosen.sum()))


def judge(comparison: Comparison) -> list[Finding]:
    """The claim, the control for neurons that move everything, the first order, and the neutral clamp."""
    layers = sorted({s.data["target"].layer for s in comparison.samples})
    ratio = {layer: effect_ratio(comparison, METHOD, RANDOM, layer) for layer in (None, *layers)}
    specific = effect_ratio(comparison, METHOD, OTHER)
    first_order = comparison.interval(METHOD, "correlation")
    neutral = float(comparison.values(PLAIN, "effect").max())
    means = ", ".join(f"{s} {comparison.mean(s, 'effect'):.2f}" for s in (METHOD, RANDOM, OTHER))
    by_layer = "; ".join(f"layer {layer}: {_show(ratio[layer])}" for layer in layers)
    return [
        Finding(
            "Clamping a named neuron moves its token at least 1.5 times as much as clamping a random neuron of its "
            "layer does.",
            ratio[None].mean >= 1.5 and ratio[None].low > 1,
            f"effect in nats: {means}; ratio {_show(ratio[None])}; {by_layer}",
        ),
        Finding(
            "It is its own token that a named neuron moves: the tokens of other named neurons move less.",
            specific.low > 1,
            f"own / other token: {_show(specific)}",
        ),
        Finding(
            "The effect follows value * act(gate) * (unembedding row . down column): its correlation is positive.",
            first_order.low > 0,
            f"correlation: {_show(first_order)}",
        ),
        Finding(
            "A neuron held at its own value changes nothing.",
            neutral < 1e-3,
            f"largest effect: {neutral:.1e} nats",
        ),
    ]


def _show(interval: Interval) -> str:
    return f"{interval:.2f}"
