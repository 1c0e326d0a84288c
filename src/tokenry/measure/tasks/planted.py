"""The task `planted`: of several facts, only one is what a later sentence says. Is it the sentence found to matter?"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.calibration import spearman
from ...data.corpora import docstrings
from ...read.anchors.receivers import ReceiverHeads, receiver_heads, receiver_scores
from ...read.anchors.sentences import segment_sentences, sentences_of
from ...read.anchors.suppression import suppression_matrix
from ...read.thought_anchors import ThoughtAnchors
from ...trace.reducers import SentenceMean
from ...trace.trace import Trace, capture
from ..task import Arm, Metric, Outcome, Sample

__all__ = ["FACTS", "PlantedTask", "heads_of_prose"]

FACTS = 8
NAMES = ("Anna", "Ben", "Carl", "Dora", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Laura", "Mary", "Peter")
FOLLOWED = (
    "{name} looked at the number {code} again.",
    "The door opened for {name} and the number {code}.",
    "Nobody but {name} knows the number {code}.",
    "Then {name} wrote {code} on a piece of paper.",
)
SENTENCES, LETTERS = (14, 40), 1600  # of prose: sentences of a text, characters that are looked at


def _traced(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> Trace:
    mean = SentenceMean([(s.start, s.stop) for s in segment_sentences(text, tokenizer)])
    ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
    with capture(model, tokenizer, reducers=[mean]) as cap, torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    return cap.trace


def heads_of_prose(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: int, method: ThoughtAnchors
) -> ReceiverHeads:
    """Receiver heads of the documentation of Python's libraries."""
    chosen: list[str] = []
    low, high = SENTENCES
    for document in docstrings():
        text = " ".join(document[:LETTERS].split())
        if len(chosen) < texts and low <= len(segment_sentences(text, tokenizer)) <= high:
            chosen.append(text)
    traces = [_traced(model, tokenizer, text) for text in chosen]
    return receiver_heads(traces, method.top_k_heads, method.proximity, method.control_depth)


class PlantedTask:
    """A sample is a text of eight facts and five sentences that come back to one of them.

    An arm's `apply` is the name of one of the routes, see `_scores`.
    """

    slug: ClassVar[str] = "planted"
    stage: ClassVar[str] = "read"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("first", "higher", "1 if the planted fact scores highest of the eight facts"),
        Metric("rank", "lower", "rank of the planted fact among the eight, 1 the highest"),
        Metric("agreement", None, "rank correlation over the sentences with what hiding each does to all later ones"),
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        count: int,
        heads: ReceiverHeads,
        method: ThoughtAnchors,
    ) -> None:
        self.model, self.tokenizer, self.count, self.heads, self.method = model, tokenizer, count, heads, method
        self.setting = {"facts": FACTS, "followed": list(FOLLOWED), **method.model_dump(mode="json")}
        self._known: dict[str, tuple[Trace, Tensor]] = {}

    def samples(self) -> list[Sample]:
        made = []
        for number in range(self.count):
            rng = random.Random(f"planted {number}")
            names = rng.sample(NAMES, FACTS)
            codes = rng.sample(range(1000, 10_000), FACTS)
            planted = rng.randrange(FACTS)
            facts = [f"The secret number of {name} is {code}." for name, code in zip(names, codes)]
            name, code = names[planted], codes[planted]
            later = [f"As you remember, the secret number of {name} is {code}."]
            later += [line.format(name=name, code=code) for line in rng.sample(FOLLOWED, len(FOLLOWED))]
            made.append(Sample(str(number), " ".join(facts + later), {"planted": planted}))
        return made

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        outcomes = []
        for sample in samples:
            start = time.perf_counter()
            trace, effects = self._measured(sample)
            overall = effects.nanmean(0)
            scores, of_facts = self._scores(arm.apply, sample, trace, effects)
            planted = sample.data["planted"]
            rank = 1 + int((of_facts > of_facts[planted]).sum())
            both = scores.isfinite() & overall.isfinite()
            agreement = spearman(scores[both].numpy(), overall[both].numpy())
            metrics = {"first": float(rank == 1), "rank": float(rank), "agreement": agreement}
            cost = {"seconds": time.perf_counter() - start}
            best = sentences_of(trace)[int(of_facts.argmax())].text
            outcomes.append(Outcome(metrics, cost, {"note": f"fact {planted} was planted; first: {best}"}))
        return outcomes

    def _measured(self, sample: Sample) -> tuple[Trace, Tensor]:
        """The trace of a sample and its suppression matrix; all arms share them."""
        if sample.id not in self._known:
            trace = _traced(self.model, self.tokenizer, sample.prompt)
            given = {"temperature": self.method.kl_temperature, "align": self.method.align}
            self._known = {sample.id: (trace, suppression_matrix(self.model, trace, **given))}
        return self._known[sample.id]

    def _scores(self, route: str, sample: Sample, trace: Trace, effects: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of all sentences, and those of the facts."""
        rng = random.Random(f"{route} {sample.id}")
        if route == "suppression":
            return effects.nanmean(0), effects[FACTS, :FACTS]  # what it does to the first sentence that comes back
        if route == "place":
            nearest = torch.arange(float(len(effects)))
            return nearest, nearest[:FACTS]
        if route == "shuffled":
            order = rng.sample(range(FACTS), FACTS)
            rest = list(range(FACTS, len(effects)))
            return effects.nanmean(0)[order + rest], effects[FACTS, order]
        layers, heads = self.heads.kurtosis.shape
        every = [(layer, head) for layer in range(1, layers) for head in range(heads)]
        others = [head for head in every if head not in self.heads.heads]
        chosen = self.heads.heads if route == "receivers" else rng.sample(others, len(self.heads.heads))
        scores = receiver_scores(trace, chosen, self.method.proximity, self.method.control_depth)
        return scores, scores[:FACTS]
