"""What a judge method is: parameters, and the scorer they make of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, Field, RootModel

from ..core.method import Method
from ..core.progress import Progress
from ..core.schemas import Exchanged
from ..models.load import Loaded
from ..trace.trace import Trace
from .answers.samples import Sample
from .answers.scores import ScoredPrompt, Scores

__all__ = ["JudgeAnswer", "JudgeMethod", "JudgeRequest", "Scorer"]


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
    """A method of the judge stage.

    CRew(marker="answer").scorer(load("zoo/reasoner")).score(samples).values
    """

    stage: ClassVar[str] = "judge"
    input: ClassVar[type[BaseModel]] = JudgeRequest
    output: ClassVar[type[BaseModel]] = JudgeAnswer

    def scorer(self, loaded: Loaded, chat: bool = True) -> Scorer:
        """The scorer of one model.

        Args:
            chat: put each prompt through the model's chat template, where its tokenizer has one.
        """
        raise NotImplementedError
