"""The task `topics`: does a probe along the tokens turn where a text turns from an animal to a machine, or back?"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
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
    """A sample is a noun that no probe has learned: a text for each frame that it stands in, behind a sentence about a
    noun of the other kind, which no probe has learned either. So what is known of a noun counts once.

    An arm's `apply` says how the probe learns: from the labels, shuffled ones, or by means.

    Args:
        count: nouns, at most those of the split.
        split: "dev" or "test", for the nouns of the samples; probes learn from those of "train".

    Raises:
        InputError: more nouns than there are.
    """

    slug: ClassVar[str] = "topics"
    stage: ClassVar[str] = "read"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("right", "higher", "share of the sentences with the noun alone at whose end the probe knows its kind"),
        Metric("turn", "higher", "mean of the curve from the noun on minus that from the other one, to its kind"),
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
        self.kinds = [kind[SPLITS[split]] for kind in NOUNS]
        there = sum(map(len, self.kinds))
        if count > there:
            raise InputError(f"samples={count} is not possible; there are {there} nouns to ask for")
        self.model, self.tokenizer, self.method, self.count = model, tokenizer, method, count
        self.setting = {"nouns": [list(kind) for kind in NOUNS], "split": split, "frames": list(FRAMES)}
        self._probes: dict[tuple[str, int], LinearProbe] = {}

    def samples(self) -> list[Sample]:
        made = []
        for number in range(self.count):
            label = number % 2
            noun = self.kinds[label][number // 2]
            rng, texts = random.Random(f"topics {noun}"), []
            for frame in FRAMES:
                other = rng.choice(self.kinds[1 - label])
                before = rng.choice([one for one in FRAMES if one != frame])
                texts.append((f"{before.format(other)}. {frame.format(noun)}", other))
            made.append(Sample(noun, "\n".join(text for text, _ in texts), {"label": label, "texts": texts}))
        return made

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        probe, start = self._probe(arm.apply, seed), time.perf_counter()
        found = [self._measured(probe, sample) for sample in samples]
        cost = {"seconds": (time.perf_counter() - start) / len(samples)}
        return [Outcome(each, cost, {"note": sample.prompt}) for each, sample in zip(found, samples)]

    def _measured(self, probe: LinearProbe, sample: Sample) -> dict[str, float]:
        label, texts = sample.data["label"], [text for text, _ in sample.data["texts"]]
        alone = [text.partition(". ")[2] for text in texts]
        said = probe.probabilities(end_states(self.model, self.tokenizer, alone, probe.layer))
        traces = list(traced(self.model, self.tokenizer, texts, probe.layer))
        turns = [
            _turn(probe.curve(trace), trace, other, sample.id, label)
            for trace, (_, other) in zip(traces, sample.data["texts"], strict=True)
        ]
        return {
            "right": float(((said > 0.5) == bool(label)).float().mean()),
            "turn": sum(turns) / len(turns),
            "gap": max(self._gap(trace.ids, probe.direction) for trace in traces),
        }

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


def _turn(curve: Tensor, trace: Trace, first: str, second: str, label: int) -> float:
    """Mean of the curve along the second sentence minus that along the first, from the noun on, towards its kind."""
    ends, text = trace.offsets[:, 1], trace.text
    early = (ends >= text.index(first) + len(first)) & (ends <= text.index(". "))
    late = ends >= text.rindex(second) + len(second)
    return float(curve[late].mean() - curve[early].mean()) * (1 if label else -1)
