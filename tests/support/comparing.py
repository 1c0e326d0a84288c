"""A small real task: how far an estimate of a square root is off."""

import math

from tokenry.measure.claims import Finding, below
from tokenry.measure.experiment import Experiment
from tokenry.measure.task import Arm, Metric, Outcome, Sample


class Roots:
    slug, stage = "roots", "decode"
    metrics = (Metric("error", "lower", "distance from the square root"), Metric("size", None, "the number"))

    def __init__(self, count=6, stop_at=None):
        self.count, self.stop_at, self.log = count, stop_at, []

    def samples(self):
        return [Sample(f"n{i}", f"root of {i}", {"n": i}) for i in range(1, self.count + 1)]

    def run(self, arm, samples, seed):
        if self.stop_at is not None and len(self.log) == self.stop_at:
            raise KeyboardInterrupt
        self.log.append((arm.name, [s.id for s in samples], seed))
        found = []
        for sample in samples:
            n, x = sample.data["n"], 1.0 + 0.1 * seed
            for _ in range(arm.apply):
                x = (x + n / x) / 2
            detail = {"tokens": [[f"root </script> {x:.2f}", 0.5]], "marks": [{"index": 0, "kind": "x", "rule": "r"}]}
            cost = {"seconds": 0.01 * arm.apply, "tokens": 1.0}
            found.append(Outcome({"error": abs(x - math.sqrt(n)), "size": float(n)}, cost, detail))
        return found


def experiment(task=None, seeds=(0, 1), batch=2):
    return Experiment(
        slug="roots",
        claim="More steps are closer.",
        task=task or Roots(),
        arms=[
            Arm("one step", role="plain", setting={"steps": 1}, apply=1),
            Arm("four steps", setting={"steps": 4}, apply=4),
        ],
        baseline="one step",
        findings=lambda c: [Finding("closer", below(c.gap("error", "four steps", "one step"), 0), main=True)],
        seeds=seeds,
        batch=batch,
    )
