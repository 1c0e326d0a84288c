"""The task `planted`: of several facts, only one is what a later sentence says. Is it the sentence found to matter?"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from math import isnan, nan
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.calibration import spearman
from ...data.corpora import docstrings
from ...read.anchors.receivers import ReceiverHeads, receiver_heads, receiver_scores
from ...read.anchors.rollouts import CounterfactualImportance
from ...read.anchors.sentences import segment_sentences, sentences_of
from ...read.thought_anchors import ThoughtAnchors
from ...trace.reducers import SentenceMean
from ...trace.trace import Trace, capture
from ..task import Arm, Metric, Outcome, Sample
from .beginnings import Beginnings

__all__ = ["FACTS", "PlantedTask", "heads_of_prose"]

FACTS = 8
NAMES = ("Anna", "Ben", "Carl", "Dora", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Laura", "Mary", "Peter")
FOLLOWED = (
    "{name} looked at the number {code} again.",
    "The door opened for {name} and the number {code}.",
    "Nobody but {name} knows the number {code}.",
    "Then {name} wrote {code} on a piece of paper.",
)
ASKED = " As you remember, the secret number of {name} is"  # asked after rollouts, and what forces an answer
REWRITTEN, ANSWER = 24, 6  # tokens written in the place of a fact and of what follows it, and tokens of an answer
NUMBER = re.compile(r"\d+")
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


class Measured(NamedTuple):
    """What the arms share for a sample.

    Attributes:
        effects: the suppression matrix.
        resampled, forced: (sentences,) what each fact adds to the accuracy, NaN for the sentences behind the facts.
    """

    trace: Trace
    effects: Tensor
    resampled: Tensor
    forced: Tensor


class PlantedTask:
    """A sample is a text of eight facts and five sentences that come back to one of them.

    An arm's `apply` is the name of one of the routes, see `_scores`.
    """

    slug: ClassVar[str] = "planted"
    stage: ClassVar[str] = "read"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("first", "higher", "1 if the planted fact scores highest of the eight facts, and alone"),
        Metric("rank", "lower", "rank of the planted fact among the eight, 1 the highest, behind those as high"),
        Metric("agreement", None, "rank correlation over the sentences with what hiding each does to all later ones"),
        Metric("resampled", None, "rank correlation over the facts with what each, if kept, adds to the accuracy"),
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
        options = method.model_dump(mode="json")
        self.setting = {"facts": FACTS, "followed": list(FOLLOWED), "rewritten": REWRITTEN, **options}
        self._known: dict[str, Measured] = {}

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
            data = {"planted": planted, "name": name, "code": str(code)}
            made.append(Sample(str(number), " ".join(facts + later), data))
        return made

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        outcomes = []
        for sample in samples:
            start = time.perf_counter()
            shared = self._measured(sample)
            scores, of_facts = self._scores(arm.apply, sample, shared)
            planted = sample.data["planted"]
            rank = int((of_facts >= of_facts[planted]).sum())
            metrics = {
                "first": float(rank == 1),
                "rank": float(rank),
                "agreement": _agreement(scores, shared.effects.nanmean(0)),
                "resampled": _agreement(scores, shared.resampled),
            }
            cost = {"seconds": time.perf_counter() - start}
            best = sentences_of(shared.trace)[int(of_facts.argmax())].text
            outcomes.append(Outcome(metrics, cost, {"note": f"fact {planted} was planted; first: {best}"}))
        return outcomes

    def _measured(self, sample: Sample) -> Measured:
        if sample.id not in self._known:
            trace = _traced(self.model, self.tokenizer, sample.prompt)
            effects = self.method.suppression(self.model, trace)
            self._known = {sample.id: Measured(trace, effects, *self._rewritten(sample, trace))}
        return self._known[sample.id]

    def _rewritten(self, sample: Sample, trace: Trace) -> tuple[Tensor, Tensor]:
        """What each fact adds to the accuracy of the number that is asked for: where it and all that follows is written
        anew, and where the answer comes at once.
        """
        method, sentences = self.method, sentences_of(trace)
        asked = ASKED.format(name=sample.data["name"])
        words, starts = _ids(self.tokenizer, asked), [s.start for s in sentences[: FACTS + 1]]
        sampling = {"do_sample": True, "temperature": method.temperature, "top_p": method.top_p, "top_k": 0}
        begun = Beginnings.of(self.model, self.tokenizer, trace.ids, starts)
        anew = begun.repeated(method.rollouts).written(REWRITTEN, **sampling)
        anew = anew.then(words).written(ANSWER, do_sample=False)
        at_once = begun.then(words).repeated(method.rollouts).written(ANSWER, **sampling)

        def answered(text: str) -> str:
            found = NUMBER.match(text.rpartition(asked)[2].strip())
            return found[0] if found else "none"

        def importance(made: Beginnings, more: int) -> CounterfactualImportance:
            texts = {start + more: made.texts[i * n : (i + 1) * n] for i, start in enumerate(starts)}
            return CounterfactualImportance(lambda ids, _: texts.get(len(ids), []), _words, answered, n=n)

        n, code, behind = method.rollouts, sample.data["code"], [nan] * (len(sentences) - FACTS)
        resampling = importance(anew, 0)
        kept = [each.resampling_accuracy for each in resampling.score(resampling.sample(trace), code)]
        forced = importance(at_once, len(words)).forced(trace, self.tokenizer, code, asked)
        return torch.tensor(kept[:FACTS] + behind), torch.tensor(forced[:FACTS] + behind)

    def _scores(self, route: str, sample: Sample, shared: Measured) -> tuple[Tensor, Tensor]:
        """The scores of all sentences, and those of the facts."""
        trace, effects, resampled, forced = shared
        if route in ("resampled", "forced"):
            found = resampled if route == "resampled" else forced
            return found, found[:FACTS]
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


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return cast(list[int], tokenizer(text, add_special_tokens=False).input_ids)


def _agreement(scores: Tensor, others: Tensor) -> float:
    """Rank correlation where both are known; 0 where one of them sets nothing apart."""
    both = scores.isfinite() & others.isfinite()
    found = spearman(scores[both].numpy(), others[both].numpy())
    return 0.0 if isnan(found) else found


def _words(texts: Sequence[str]) -> Tensor:
    """How often each word stands in a text (texts, words)."""
    words = {word: i for i, word in enumerate(dict.fromkeys(word for text in texts for word in text.split()))}
    counts = torch.zeros(len(texts), len(words))
    for row, text in zip(counts, texts):
        for word in text.split():
            row[words[word]] += 1
    return counts
