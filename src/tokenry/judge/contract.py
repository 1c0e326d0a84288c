"""What a judge method is: parameters, and the scorer they make of a model, what they say of results or of translations,
or the two sides of an audit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, Field, RootModel

from ..core.method import Method
from ..core.progress import Progress
from ..core.schemas import Exchanged
from ..models.load import Loaded
from ..trace.trace import Trace
from .answers.samples import Sample
from .answers.scores import ScoredPrompt, Scores
from .quality.answer import JudgedTranslation, TranslationAnswer, TranslationRow
from .receipts.auditor import Auditor, AuditReport
from .receipts.heads import MatchingHeads
from .receipts.provider import Provider
from .receipts.receipt import HiddenReasoning
from .scaling.results import ResultRow, Results

__all__ = [
    "JudgeAnswer",
    "JudgeMethod",
    "JudgeRequest",
    "ReceiptAnswer",
    "ReceiptMethod",
    "ReceiptRequest",
    "Report",
    "ResultsMethod",
    "ResultsRequest",
    "Scorer",
    "ScorerMethod",
    "TranslationMethod",
    "TranslationRequest",
]


class JudgeRequest(Exchanged):
    """Solutions to score."""

    samples: list[Sample] = Field(min_length=1)
    raw: bool = Field(default=False, description="take the prompts as they are, without the chat template")


class JudgeAnswer(RootModel[list[ScoredPrompt]]):
    """For each prompt its solutions with their scores, the best one, and a vote weighted by the scores."""


class Scorer(ABC):
    """Scores solutions by a model, their own or another one."""

    @abstractmethod
    def score(self, samples: Sequence[Sample | Trace], progress: Progress | None = None) -> Scores:
        """The worth of solutions given as text, or as traces of their generation.

        Args:
            progress: called with (solutions done, all).
        """


class JudgeMethod(Method):
    """A method of the judge stage, of one of the kinds below."""

    stage: ClassVar[str] = "judge"


class ScorerMethod(JudgeMethod):
    """A judge of solutions.

    CRew(marker="answer").scorer(load("zoo/reasoner")).score(samples).values
    """

    input: ClassVar[type[BaseModel]] = JudgeRequest
    output: ClassVar[type[BaseModel]] = JudgeAnswer

    def scorer(self, loaded: Loaded, chat: bool = True) -> Scorer:
        """The scorer of one model.

        Args:
            chat: put each prompt through the model's chat template, where its tokenizer has one.
        """
        raise NotImplementedError


class ResultsRequest(Exchanged):
    """Results to judge."""

    rows: list[ResultRow] = Field(min_length=1)


class Report(ABC):
    """What a method says of results."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """As the method's `output` declares it."""

    @abstractmethod
    def table(self) -> str:
        """As lines of text."""

    @abstractmethod
    def picture(self) -> str:
        """As the text of an SVG file."""


class ResultsMethod(JudgeMethod):
    """A judge of what a model, any model, has achieved with several levels of effort; it needs none itself.

    print(Arise().judge(Results.from_rows(rows)).table())
    """

    input: ClassVar[type[BaseModel]] = ResultsRequest

    def judge(self, results: Results) -> Report:
        """What the method says of results.

        Raises:
            InputError: results that it cannot judge.
        """
        raise NotImplementedError


class ReceiptRequest(Exchanged):
    """Hidden reasoning to commit to, or to learn from."""

    traces: list[HiddenReasoning] = Field(min_length=1)


class ReceiptAnswer(RootModel[list[AuditReport]]):
    """What the audit of each receipt found."""


class ReceiptMethod(JudgeMethod):
    """A judge of bills for tokens that the user never sees: one side commits, the other one audits.

    provider, auditor = method.provider(loaded), method.auditor(loaded)
    receipt = provider.commit(trace)
    print(auditor.audit(receipt, answer, provider.open).table())
    """

    input: ClassVar[type[BaseModel]] = ReceiptRequest
    output: ClassVar[type[BaseModel]] = ReceiptAnswer

    def provider(self, loaded: Loaded) -> Provider:
        """Who commits to tokens of the model's tokenizer and opens what an audit draws."""
        raise NotImplementedError

    def auditor(self, loaded: Loaded) -> Auditor:
        """Who audits receipts.

        Raises:
            InputError: what it needs was not learned yet.
        """
        raise NotImplementedError

    def fit(self, loaded: Loaded, traces: Sequence[HiddenReasoning], progress: Progress | None = None) -> MatchingHeads:
        """Learn from honest reasoning what an audit needs. `progress` is called with (steps done, all)."""
        raise NotImplementedError


class TranslationRequest(Exchanged):
    """Translations to judge."""

    rows: list[TranslationRow] = Field(min_length=1)


class TranslationMethod(JudgeMethod):
    """A judge of translations, sentence by sentence and word by word: it labels some by references, learns from these,
    and then estimates others without.
    """

    input: ClassVar[type[BaseModel]] = TranslationRequest
    output: ClassVar[type[BaseModel]] = TranslationAnswer

    @property
    def estimates(self) -> bool:
        """Whether it has learned, so that it estimates."""
        raise NotImplementedError

    def check(self, rows: Sequence[TranslationRow], learns: bool = False) -> None:
        """Refuse rows that cannot be judged, before a model is loaded; `learns`: whether `fit` follows.

        Raises:
            InputError: one of them, or an option that is missing.
        """
        raise NotImplementedError

    def label(self, rows: Sequence[TranslationRow], generator: Loaded | None = None) -> list[JudgedTranslation]:
        """Translations with their errors, by references; `generator` writes those that are missing."""
        raise NotImplementedError

    def fit(self, judged: Sequence[JudgedTranslation], progress: Progress | None = None) -> Loaded:
        """A model that has learned from labeled translations, and its tokenizer, to save in one folder."""
        raise NotImplementedError

    def estimate(self, rows: Sequence[TranslationRow]) -> list[JudgedTranslation]:
        """What is wrong with translations, without references."""
        raise NotImplementedError
