"""What ARISE answers, as JSON."""

from __future__ import annotations

from ...core.schemas import Exchanged

__all__ = ["AriseAnswer", "LevelMeans", "LossAnswer", "NullValue", "QuestionScore"]


class NullValue(Exchanged):
    """Scores of permuted levels: mean, middle 95 %, and how many reach the score."""

    mean: float
    interval: tuple[float, float]
    p_value: float


class LevelMeans(Exchanged):
    level: str | int | float
    accuracy: float
    tokens: float


class QuestionScore(Exchanged):
    question: str
    score: float


class LossAnswer(Exchanged):
    question: str
    level: str | int | float
    drop: float
    extra_tokens: float
    ratio: float
    penalty: float
    severe: bool


class AriseAnswer(Exchanged):
    """The score with its 95 % interval over questions, its null value, and every loss."""

    score: float
    interval: tuple[float, float]
    null: NullValue
    median: float
    clipped: float
    std: float
    slope: float
    improved_steps: int
    degraded_steps: int
    always_right: int
    always_wrong: int
    levels: list[LevelMeans]
    questions: list[QuestionScore]
    losses: list[LossAnswer]
