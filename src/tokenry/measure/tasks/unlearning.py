"""The task `unlearning`: what a model still does after training, in stories, in ordinary text and at held-out pairs."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...train.preference.collator import FTPOCollator
from ...train.preference.evaluation import score_pairs
from ..task import Arm, Metric, Outcome, Sample
from .stories import StoriesTask

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["UnlearningTask", "ordinary_texts"]

TOKENS = 256  # of each ordinary text
TUNED_ON = 24  # story prompts that settings were chosen on


def ordinary_texts(count: int) -> list[str]:
    """Passages of Python's language reference, as it ships with Python."""
    long = [text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 6 * TOKENS]
    return long[:count]


class UnlearningTask:
    """Three kinds of samples; a metric that does not belong to a sample's kind is missing there.

    * stories on held-out prompts, sampled from the trained model: banned patterns, perplexity under the plain model;
    * passages of ordinary text: their likelihood under the trained model;
    * held-out preference pairs: whether the chosen tokens win, and how far the other logits moved.

    Only stories depend on the seed; the others are measured once.

    An arm's `apply` is {"adapter": name or None, and keyword arguments for `tokenry.generate`}.
    """

    slug: ClassVar[str] = "unlearning"
    stage: ClassVar[str] = "train"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("hits_per_1000_words", "lower", "banned patterns in 1,000 words of a story"),
        Metric("perplexity", "lower", "of the story under the plain model"),
        Metric("distinct_2", "higher", "different word pairs / word pairs, within a story"),
        Metric("words", None, "words in a story"),
        Metric("text_nll", "lower", "nats per token of ordinary text"),
        Metric("choice_win", "higher", "share of chosen tokens above the rejected one, at a held-out pair"),
        Metric("rejected", "lower", "probability of the rejected token there"),
        Metric("drift", "lower", "mean absolute change of the other logits there"),
    )

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        patterns: Sequence[str],
        pairs: Sequence[dict[str, Any]],
        stories: int,
        passages: int,
        max_length: int,
    ) -> None:
        self.model, self.tokenizer, self.pairs = model, tokenizer, list(pairs)
        self.stories = StoriesTask(cast(PreTrainedModel, model), tokenizer, patterns, stories, first=TUNED_ON)
        self.setting = {**self.stories.setting, "max_length": max_length}
        self.passages = ordinary_texts(passages)
        self.collator = FTPOCollator(cast(int, tokenizer.pad_token_id), max_length)
        self.known: dict[str, dict[str, Outcome]] = {}  # of each arm: what no seed changes

    def samples(self) -> list[Sample]:
        passages = [Sample(f"text-{i:02}", text) for i, text in enumerate(self.passages)]
        pairs = [
            Sample(f"pair-{i:03}", cast(str, self.tokenizer.decode(pair["prompt_ids"])), {"pair": pair})
            for i, pair in enumerate(self.pairs)
        ]
        return [*self.stories.samples(), *passages, *pairs]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        stories = [s for s in samples if s.id.startswith("story")]
        made = dict(zip([s.id for s in stories], self._stories(arm, stories, seed))) if stories else {}
        for kind, measure in (("text", self._passages), ("pair", self._pairs)):
            known = self.known.setdefault(arm.name, {})
            new = [s for s in samples if s.id.startswith(kind) and s.id not in known]
            if new:
                known |= zip([s.id for s in new], measure(arm, new))
        return [made.get(s.id) or self.known[arm.name][s.id] for s in samples]

    def _stories(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        options = {k: v for k, v in arm.options.items() if k != "adapter"}
        with self._adapter(arm):
            written = self.stories.write(Arm(arm.name, role=arm.role, apply=options), samples, seed)
        with self._adapter(None):
            return self.stories.score(*written)

    def _passages(self, arm: Arm, samples: Sequence[Sample]) -> list[Outcome]:
        found = []
        with self._adapter(arm), torch.no_grad():
            for sample in samples:
                cut = {"truncation": True, "max_length": TOKENS}
                ids = self.tokenizer(sample.prompt, return_tensors="pt", **cut).input_ids.to(self.model.device)
                logprobs = self.model(ids[:, :-1], use_cache=False).logits[0].float().log_softmax(-1)
                nll = -logprobs.gather(1, ids[0, 1:, None]).mean()
                found.append(Outcome({"text_nll": float(nll)}))
        return found

    def _pairs(self, arm: Arm, samples: Sequence[Sample]) -> list[Outcome]:
        pairs = [s.data["pair"] for s in samples]
        trained = arm.apply["adapter"] is not None
        with self._adapter(arm):
            scores = score_pairs(self.model, pairs, self.collator, reference=trained)
        scores.setdefault("drift", torch.zeros(len(pairs)))
        names = ("choice_win", "rejected", "drift")
        return [Outcome({name: float(scores[name][i]) for name in names}) for i in range(len(pairs))]

    @contextmanager
    def _adapter(self, arm: Arm | None) -> Iterator[None]:
        """The model as this arm has it; without one, as it was."""
        name = arm.apply["adapter"] if arm else None
        if name is None:
            with cast(Any, self.model).disable_adapter():
                yield
        else:
            cast(Any, self.model).set_adapter(name)
            yield
