"""The task `translation-quality`: estimators that learned from synthetic errors, on a third model's translations."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ...core.calibration import spearman
from ...core.errors import InputError
from ...data.problems import Split
from ...data.translation import draw_sentences, errors_of, lexicon, parse, vocabulary
from ...judge.dcsqe import DCSQE
from ...judge.quality.answer import JudgedTranslation, TranslationRow
from ...judge.quality.metrics import mcc
from ...models.load import Loaded
from ..task import Arm, Metric, Outcome, Sample, Statistic

__all__ = ["REPLACED", "STATISTICS", "Synthesis", "TranslationQualityTask", "check_pair"]

MADE_FROM = 1  # the third of the training sentences that translations are made from: the annotator's
REPLACED = 0.2  # share of words that random replacement changes


class Synthesis(NamedTuple):
    """How an arm's training data are made: by whom translations are written, and who judges them."""

    writes: str  # "constrained", "plain" or "random"
    judges: str = "annotator"  # or "generator"


def check_pair(tokenizer: Any) -> None:
    """Refuse a model of another language pair."""
    if not set(vocabulary()) <= set(tokenizer.get_vocab()):
        raise InputError("the model does not know the words of zoo/translator-a; use --model zoo/translator-a")


class TranslationQualityTask:
    """Sentences of `split`, translated by a model that took no part in the training data; its true errors are known.

    An arm's `apply` is a `Synthesis`. For each of a run's seeds its estimator is trained anew.

    Args:
        models: "generator", "annotator" and "held_out".
        encoder: and its tokenizer, which all estimators start from.
        pairs: parallel sentences that training data are made of.
    """

    slug: ClassVar[str] = "translation-quality"
    stage: ClassVar[str] = "judge"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("hits", "higher", "wrong words that are found"),
        Metric("false", "lower", "right words said to be wrong"),
        Metric("missed", "lower", "wrong words said to be right"),
        Metric("passed", "higher", "right words said to be right"),
        Metric("estimated", None, "estimated score of the sentence"),
        Metric("score", None, "true score of the sentence"),
    )

    def __init__(
        self,
        models: Mapping[str, Loaded],
        encoder: Any,
        method: DCSQE,
        count: int,
        pairs: int,
        split: Split = "test",
    ) -> None:
        self.split: Split = split
        self.models, self.encoder, self.method, self.count = models, encoder, method, count
        self.sentences = draw_sentences(pairs, "train", MADE_FROM)
        self.setting = {"pairs": pairs, "split": split, "replaced": REPLACED}
        self._labels: dict[Synthesis, list[JudgedTranslation]] = {}
        self._written: dict[str, list[TranslationRow]] = {}
        self._trained: dict[tuple[str, int], DCSQE] = {}

    def samples(self) -> list[Sample]:
        """Translations by plain beam search of the model that was held out."""
        sentences = draw_sentences(self.count, self.split)
        plain = self.method.model_copy(update={"lam": 1.0})
        texts: list[str] = []
        for first in range(0, len(sentences), 64):
            part = sentences[first : first + 64]
            texts += plain.translate(self.models["held_out"], [s.source for s in part], [s.target for s in part])
        found = [errors_of(sentence, text.split()) for sentence, text in zip(sentences, texts)]
        return [
            Sample(f"s{i:04}", s.source, {"translation": text, "wrong": errors.wrong, "score": errors.score})
            for i, (s, text, errors) in enumerate(zip(sentences, texts, found))
        ]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        rows = [TranslationRow(source=s.prompt, translation=s.data["translation"]) for s in samples]
        judged = self._estimator(arm, seed).estimate(rows)
        return [_outcome(sample.data, one) for sample, one in zip(samples, judged)]

    def _estimator(self, arm: Arm, seed: int) -> DCSQE:
        key = arm.name, seed
        if key not in self._trained:
            learning = self.method.model_copy(update={"seed": seed, "encoder": self.encoder})
            self._trained[key] = self.method.model_copy(update={"estimator": learning.fit(self.labels(arm.apply))})
        return self._trained[key]

    def labels(self, how: Synthesis) -> list[JudgedTranslation]:
        """The training data of an arm."""
        if how not in self._labels:
            method = self.method.model_copy(update={"annotator": self.models[how.judges]})
            self._labels[how] = method.label(self.written(how.writes), self.models["generator"], parse)
        return self._labels[how]

    def written(self, how: str) -> list[TranslationRow]:
        """Translations of the parallel sentences, with errors."""
        if how not in self._written:
            rng = random.Random("replacement")
            texts = [_replaced(s.target, rng) if how == "random" else None for s in self.sentences]
            if how != "random":
                method = self.method if how == "constrained" else self.method.model_copy(update={"lam": 1.0})
                for first in range(0, len(texts), 32):
                    part = self.sentences[first : first + 32]
                    pairs = [s.source for s in part], [s.target for s in part]
                    texts[first : first + 32] = method.translate(self.models["generator"], *pairs)
            self._written[how] = [
                TranslationRow(source=s.source, reference=s.target, translation=text)
                for s, text in zip(self.sentences, texts)
            ]
        return self._written[how]


def _replaced(text: str, rng: random.Random) -> str:
    """A reference with some words replaced by any words of the target language."""
    words = _target_words()
    return " ".join(rng.choice(words) if rng.random() < REPLACED else word for word in text.split())


def _target_words() -> list[str]:
    return sorted({target for word in lexicon().values() for target in word.targets})


def _outcome(true: Mapping[str, Any], one: JudgedTranslation) -> Outcome:
    wrong, said = np.array(true["wrong"], bool), np.array([severity != "ok" for severity in one.severities])
    counts = {
        "hits": wrong & said,
        "false": ~wrong & said,
        "missed": wrong & ~said,
        "passed": ~wrong & ~said,
    }
    metrics = {name: float(found.sum()) for name, found in counts.items()}
    detail = {"translation": one.translation, "bad": [round(p, 3) for p in one.bad], "wrong": true["wrong"]}
    return Outcome({**metrics, "estimated": one.score, "score": true["score"]}, {}, detail)


def _mcc(table: Mapping[str, np.ndarray]) -> float:
    return mcc(*(float(table[name].sum()) for name in ("hits", "false", "missed", "passed")))


STATISTICS = (
    Statistic("mcc", "higher", "Matthews' correlation of the words' tags", _mcc),
    Statistic(
        "spearman",
        "higher",
        "rank correlation of the sentences' scores",
        lambda t: spearman(t["estimated"], t["score"]),
    ),
)
