"""Do probe, curve and heads work in a model that refuses nothing, with a property that has nothing to do with it?"""

from __future__ import annotations

from ..measure.claims import Finding, above, at_least, at_most
from ..measure.compare import Comparison, beats
from ..measure.experiment import Design, Run, experiment
from ..measure.task import Arm, Role
from ..measure.tasks.topics import TopicTask
from ..read.refusal_cliff import RefusalCliff

__all__ = ["build"]

PROBE, MEANS, SHUFFLED = "probe", "difference of means", "probe of shuffled labels"
EXACT = 1e-3  # of sums in float32


@experiment(
    "probe-along-tokens",
    RefusalCliff,
    samples=16,
    seeds=(0, 1, 2),
    batch=4,
    quick=4,
    claim="A linear probe of any property, followed along the tokens, turns where the text does, and what the heads "
    "add along it sums to what attention writes.",
)
def build(run: Run[RefusalCliff]) -> Design:
    """Texts that turn from an animal to a machine or back; samples are nouns, of which there are 16. A seed trains the
    probe."""
    method = run.settings(RefusalCliff, learning_rate=0.01, epochs=30)
    setting = method.model_dump(mode="json")

    def arm(name: str, how: str, role: Role = "method") -> Arm:
        return Arm(name, role=role, setting={**setting, "learns": how}, apply=how)

    return Design(
        task=TopicTask(run.model, run.tokenizer, method, run.count),
        arms=[arm(MEANS, "means", "plain"), arm(SHUFFLED, "shuffled", "control"), arm(PROBE, "labels")],
        baseline=MEANS,
        tried="On dev: learning rates of 0.001 and 0.01, and hidden states 4 to 30, of which the last turns most and "
        "knows as many kinds as any. Before that, probes that had learned half as many nouns knew 67 % of six test "
        "samples. Then 180 texts were measured, drawn from these nouns and frames, as if no noun came twice; since "
        "then a sample is a noun, in all frames.",
        notes="The nouns of a text are not among those that probes learn from; the frames around them are.",
    )


@build.findings
def findings(c: Comparison) -> list[Finding]:
    """The kind of a noun, the turn of the curve, the sum over heads."""
    return [
        Finding(
            "The kind of a noun that was not learned is known in at least nine of ten sentences with it.",
            at_least(c.value("right", PROBE, ".1%"), 0.9),
            main=True,
            note="; ".join(f"{name} {c.mean(name, 'right'):.1%}" for name in (MEANS, SHUFFLED)),
        ),
        Finding("A probe of shuffled labels knows it less often.", beats(c, "right", PROBE, [SHUFFLED])),
        Finding(
            "Along the tokens the probability turns by more than 0.3 where the text does.",
            above(c.value("turn", PROBE, ".2f"), 0.3),
            note="; ".join(f"{name} {c.mean(name, 'turn'):.2f}" for name in (MEANS, SHUFFLED)),
        ),
        Finding(
            "What the heads of a layer add along the probe sums to what attention writes along it.",
            at_most(c.value("gap", PROBE, ".1e"), EXACT),
        ),
    ]
