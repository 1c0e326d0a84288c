"""The task `topics`: does a probe along the tokens turn where a text turns from an animal to a machine, or back?"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...hooks.residual import edit_outputs
from ...learned.linear_probe import LinearProbe, state_number
from ...models.anatomy import decoder_layers, head_mixer
from ...read.cliff.examples import end_states, traced
from ...read.cliff.heads import head_contributions
from ...read.refusal_cliff import RefusalCliff
from ...trace.trace import Trace
from ..task import Arm, Metric, Outcome, Sample

__all__ = ["TopicTask"]

NOUNS = (
    (
        "horse sheep goose rabbit donkey goat pigeon squirrel turtle spider salmon camel "
        "tiger chicken elephant frog eagle monkey duck whale wolf parrot lizard cow"
    ).split(),
    (
        "engine printer tractor pump scanner drill robot turbine toaster crane laptop motor "
        "radio truck camera calculator bicycle computer telephone vacuum oven train generator television"
    ).split(),
)
SPLITS = {"train": slice(0, 12), "dev": slice(12, 16), "test": slice(16, 24)}  # nouns of each kind
FRAMES = (
    "The {} stood behind the house",
    "We looked at the old {} for a while",
    "My sister talks about her {} a lot",
    "Nobody had seen such a small {} before",
)


class TopicTask:
    """A sample is two sentences, the first about a noun of one kind, the second about one of the other; no probe has
    learned either noun. An arm's `apply` says how the probe learns: from the labels, shuffled ones, or by means.

    Args:
        split: "dev" or "test", for the nouns of the samples; probes learn from those of "train".
    """

    slug: ClassVar[str] = "topics"
    stage: ClassVar[str] = "read"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("right", "higher", "1 if the probe knows the kind of the second noun at the end of its sentence alone"),
        Metric("turn", "higher", "mean of the curve from the second noun on minus that from the first, to its kind"),
        Metric("gap", "lower", "largest difference of the heads' sum and what attention writes, over all layers"),
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        method: RefusalCliff,
        count: int,
        split: str = "test",
    ) -> None:
        self.model, self.tokenizer, self.method, self.count, self.split = model, tokenizer, method, count, split
        self.setting = {"nouns": [list(kind) for kind in NOUNS], "split": split, "frames": list(FRAMES)}
        self._probes: dict[tuple[str, int], LinearProbe] = {}

    def samples(self) -> list[Sample]:
        made = []
        for number in range(self.count):
            rng = random.Random(f"topics {self.split} {number}")
            label = number % 2
            first, second = (rng.choice(NOUNS[kind][SPLITS[self.split]]) for kind in (1 - label, label))
            frames = [frame.format(noun) for frame, noun in zip(rng.sample(FRAMES, 2), (first, second))]
            made.append(Sample(str(number), ". ".join(frames), {"label": label, "nouns": [first, second]}))
        return made

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        probe, start = self._probe(arm.apply, seed), time.perf_counter()
        alone = [sample.prompt.partition(". ")[2] for sample in samples]
        said = probe.probabilities(end_states(self.model, self.tokenizer, alone, probe.layer)).tolist()
        traces = traced(self.model, self.tokenizer, [sample.prompt for sample in samples], probe.layer)
        measured = [
            {
                "right": float((share > 0.5) == bool(sample.data["label"])),
                "turn": _turn(probe.curve(trace), trace, sample),
                "gap": self._gap(trace.ids, probe.direction),
            }
            for sample, share, trace in zip(samples, said, traces, strict=True)
        ]
        cost = {"seconds": (time.perf_counter() - start) / len(samples)}
        return [Outcome(each, cost, {"note": sample.prompt}) for each, sample in zip(measured, samples)]

    def _probe(self, how: str, seed: int) -> LinearProbe:
        if (how, seed) not in self._probes:
            texts = [frame.format(noun) for kind in NOUNS for noun in kind[SPLITS["train"]] for frame in FRAMES]
            labels = [int(i >= len(texts) // 2) for i in range(len(texts))]
            layer = state_number(self.model, self.method.layer)
            states = end_states(self.model, self.tokenizer, texts, layer)
            if how == "shuffled":
                random.Random(f"labels {seed}").shuffle(labels)
            if how == "means":
                probe = LinearProbe(states.shape[1], layer).fit_means(states, labels)
            else:
                probe = self.method.model_copy(update={"seed": seed}).train(states, labels, layer)
            self._probes[how, seed] = probe.bind(self.model)
        return self._probes[how, seed]

    def _gap(self, ids: Tensor, direction: Tensor) -> float:
        """How far the sum over heads is from what attention writes, seen at its output, at the last token."""
        outputs: dict[int, Tensor] = {}
        mixers = [head_mixer(self.model, layer)[0] for layer in range(len(decoder_layers(self.model)))]
        edits = {mixer: lambda y, i=i: outputs.setdefault(i, y) for i, mixer in enumerate(mixers)}
        rows = ids[None].to(self.model.device)
        with torch.no_grad(), edit_outputs(self.model, edits):
            self.model(rows, use_cache=False, logits_to_keep=1)
        unit = (direction / direction.norm()).to(rows.device)
        biases = [0 if mixer.bias is None else cast(Tensor, mixer.bias) for mixer in mixers]
        with torch.no_grad():
            written = torch.stack([(outputs[i][0, -1] - bias) @ unit for i, bias in enumerate(biases)]).cpu()
        found = head_contributions(self.model, {"input_ids": rows}, direction).sum(-1)
        return float((found - written).abs().max())


def _turn(curve: Tensor, trace: Trace, sample: Sample) -> float:
    """Mean of the curve along the second sentence minus that along the first, from the noun on, towards its kind."""
    first, second = sample.data["nouns"]
    ends, text = trace.offsets[:, 1], trace.text
    early = (ends >= text.index(first) + len(first)) & (ends <= text.index(". "))
    late = ends >= text.rindex(second) + len(second)
    return float(curve[late].mean() - curve[early].mean()) * (1 if sample.data["label"] else -1)
