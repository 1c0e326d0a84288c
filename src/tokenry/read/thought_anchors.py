"""Thought anchors: which sentences of a chain of thought matter, by attention, by suppression, and by resampling.

Paper: Thought Anchors: Which LLM Reasoning Steps Matter?, arXiv 2506.19143. The importance of a sentence goes with its
place in the text, so every reading has the score of the place alone beside the others.
"""

from __future__ import annotations

from math import isfinite
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from ..core.calibration import spearman
from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Count, Portion, Temperature, Tokens
from ..models.load import Loaded
from ..text.answers import find_answer
from ..trace.reducers import SentenceMean
from ..trace.trace import Trace, capture
from .anchors.picture import AnchorReading
from .anchors.receivers import receiver_heads, receiver_scores, sentence_attention
from .anchors.rollouts import CounterfactualImportance, generate_rollouts, mean_states
from .anchors.sentences import at_least, segment_sentences, sentences_of
from .anchors.suppression import Align, Support, suppression_matrix
from .contract import ReadMethod

__all__ = ["ThoughtAnchors"]

Cosine = Annotated[float, Ge(-1), Le(1)]
ARCS = 2  # drawn for each sentence, on average


class ThoughtAnchors(ReadMethod):
    """Score the sentences of a reasoning text by three routes, and say where they agree.

        ThoughtAnchors().read(text, loaded=(model, tokenizer)).to_frame()
        ThoughtAnchors(rollouts=100).read(trace, loaded=(model, tokenizer)).to_html()

    `rollouts` adds the third route, which writes every sentence anew so many times with the model itself.
    """

    slug: ClassVar[str] = "thought-anchors"
    title: ClassVar[str] = "Thought anchors"
    paper: ClassVar[str] = "Thought Anchors: Which LLM Reasoning Steps Matter?, arXiv 2506.19143"
    claim: ClassVar[str] = (
        "The sentence that later text depends on is found by hiding it from attention, and by the heads whose "
        "attention from afar is gathered on few sentences."
    )
    published: ClassVar[Claim] = Claim(
        "3 to 4 times", "the counterfactual importance of computation is that of planning", "R1-Distill-Qwen-14B"
    )

    takes: ClassVar = ("text", "trace")
    input_options: ClassVar[tuple[str, ...]] = (
        "top_k_heads",
        "proximity",
        "control_depth",
        "kl_temperature",
        "kl_support",
        "align",
        "rollouts",
        "temperature",
        "top_p",
        "similarity",
        "max_new_tokens",
        "answer",
    )

    top_k_heads: Count = Field(default=20, description="receiver heads: those with the highest kurtosis")
    proximity: Count = Field(default=4, description="sentences back from which attention counts as from afar")
    control_depth: bool = Field(default=False, description="ranks within a row in the place of attention")
    kl_temperature: Temperature = Field(default=0.6, description="of the distributions that suppression compares")
    kl_support: Support = Field(
        default="dense",
        description="suppression compares whole distributions, or as the authors' code their likeliest tokens alone",
    )
    align: Align = Field(
        default="position", description="distributions after the tokens of a sentence, or those they are drawn from"
    )
    rollouts: Annotated[int, Ge(0), Le(10_000)] = Field(
        default=0, description="times that each sentence is written anew, at least 2; 0 leaves this route out"
    )
    temperature: Temperature = Field(default=0.6, description="of rollouts")
    top_p: Portion = Field(default=0.95, description="of rollouts")
    similarity: Cosine = Field(default=0.8, description="cosine below which a rollout writes something else")
    max_new_tokens: Tokens = Field(default=512, description="of a rollout")
    answer: str | None = Field(default=None, description="the right answer, for the accuracies of rollouts")

    def read(self, given: str | Trace, artifact: None = None, loaded: Loaded | None = None) -> AnchorReading:
        """Scores of every sentence, and which later ones it matters for.

        Args:
            given: a text, or a trace captured with qk="all" or a `SentenceMean` of its sentences.
            loaded: the model and its tokenizer.

        Returns:
            Rows of sentence, tokens, text, receiver (mean attention that receiver heads pay from afar), suppression
            (mean over later sentences of the centered ln KL), rollout (divergence of answers in nats; None without
            rollouts) and its accuracy, place (the score of the position alone), matters_for.

        Raises:
            InputError: no model, a trace of another one or without attention, too few sentences, an empty text.
        """
        if loaded is None:
            raise InputError("thought anchors run the model again; give loaded=load(...)")
        if self.rollouts == 1:
            raise InputError("rollouts=1 is not allowed; give 0 or at least 2")
        trace = self._traced(given, loaded) if isinstance(given, str) else given
        trace.check_model(loaded.model)
        sentences = sentences_of(trace)
        at_least(sentences, self.proximity)
        heads = receiver_heads([trace], self._top(trace), self.proximity, self.control_depth)
        received = receiver_scores(trace, heads, self.proximity, self.control_depth)
        effects = self.suppression(loaded.model, trace)
        suppressed = effects.nanmean(0)
        rewritten = self._rewritten(trace, loaded)
        arcs = _arcs(effects)
        rows = []
        for i, sentence in enumerate(sentences):
            rows.append(
                {
                    "sentence": i,
                    "tokens": sentence.stop - sentence.start,
                    "text": sentence.text,
                    "receiver": _known(received[i]),
                    "suppression": _known(suppressed[i]),
                    "rollout": _known(rewritten[i][0]) if rewritten else None,
                    "accuracy": _known(rewritten[i][1]) if rewritten else None,
                    "place": 1 - i / len(sentences),
                    "matters_for": sorted(second for first, second, _ in arcs if first == i),
                }
            )
        return AnchorReading(_title(rows), rows, arcs)

    def suppression(self, model: PreTrainedModel, trace: Trace) -> Tensor:
        """See `suppression_matrix`."""
        return suppression_matrix(
            model, trace, temperature=self.kl_temperature, align=self.align, kl_support=self.kl_support
        )

    def _top(self, trace: Trace) -> int:
        """As many receiver heads as are asked for; of a smaller model by default what it has."""
        if "top_k_heads" in self.model_fields_set:
            return self.top_k_heads
        layers, heads = sentence_attention(trace).shape[:2]
        return max(1, min(self.top_k_heads, (layers - 1) * heads))

    def _traced(self, text: str, loaded: Loaded) -> Trace:
        """The text with the attention between its sentences."""
        if not text.strip():
            raise InputError("the text is empty; give some text to read")
        model, tokenizer = loaded
        sentences = segment_sentences(text, tokenizer)
        at_least(sentences, self.proximity)
        ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        mean = SentenceMean([(s.start, s.stop) for s in sentences])
        with capture(model, tokenizer, reducers=[mean]) as cap, torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)
        return cap.trace

    def _rewritten(self, trace: Trace, loaded: Loaded) -> list[tuple[float, float]]:
        """For each sentence the divergence of answers and the change of accuracy when something else is written."""
        if not self.rollouts:
            return []
        generate = generate_rollouts(*loaded, self.max_new_tokens, self.temperature, self.top_p)
        importance = CounterfactualImportance(
            generate, mean_states(*loaded), _answer, n=self.rollouts, threshold=self.similarity
        )
        found = importance.score(importance.sample(trace), self.answer)
        return [(each.counterfactual_kl, each.counterfactual_accuracy) for each in found]


def _answer(text: str) -> str | None:
    """What a text comes to: a marked answer, or what follows its thinking."""
    for marker in ("boxed", "answer"):
        span = find_answer(text, marker)
        if span:
            return text[slice(*span)]
    _, closed, after = text.partition("</think>")
    return after.strip() or None if closed else None


def _arcs(effects: Tensor) -> list[tuple[int, int, float]]:
    """The strongest positive effects of one sentence on another, as (from, to, effect)."""
    values = effects.nan_to_num(0.0).flatten()
    order = values.argsort(descending=True, stable=True)[: ARCS * len(effects)].tolist()
    n = len(effects)
    return [(at % n, at // n, float(values[at])) for at in order if values[at] > 0]


def _known(value: Any) -> float | None:
    return float(value) if isfinite(value) else None


def _title(rows: list[dict[str, Any]]) -> str:
    """How far the other routes agree with suppression: rank correlations over the sentences that both score."""
    found = []
    for route in ("receiver", "rollout", "place"):
        both = [(row[route], row["suppression"]) for row in rows if None not in (row[route], row["suppression"])]
        if len(both) > 2 and all(len(set(side)) > 1 for side in zip(*both)):
            found.append(f"{route} {spearman(*zip(*both)):+.2f}")
    return "sentences by what they matter for; rank correlation with suppression: " + ", ".join(found or ["none"])
