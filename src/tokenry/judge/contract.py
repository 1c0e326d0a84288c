"""What a judge method is: parameters, and either the scorer they make of a model, or what they say of results."""

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
from .scaling.results import ResultRow, Results

__all__ = [
    "JudgeAnswer",
    "JudgeMethod",
    "JudgeRequest",
    "Report",
    "ResultsMethod",
    "ResultsRequest",
    "Scorer",
    "ScorerMethod",
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
    """A method of the judge stage, of one of the two kinds below."""

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
