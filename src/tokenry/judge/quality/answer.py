"""Translations as JSON: what is asked about them, and what is answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, Field, RootModel

from ...core.schemas import Exchanged
from .phrases import Severity

__all__ = ["JudgedTranslation", "JudgedTranslations", "TranslationAnswer", "TranslationRow"]


class TranslationRow(Exchanged):
    """A sentence, with what is known: a reference to label by, a translation to label or to estimate, its tree."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    source: str = Field(min_length=1)
    reference: str | None = None
    translation: str | None = None
    heads: list[int] | None = Field(
        default=None, description="the head of each word of the translation, counted from 1, with 0 for the root"
    )


class JudgedTranslation(Exchanged):
    """A translation with what is wrong in it.

    Words are those between blanks. `bad` is the probability that a word is wrong: 0 or 1 where it was labeled by a
    reference.
    """

    source: str
    translation: str
    bad: list[float]
    severities: list[Severity]
    score: float

    @property
    def words(self) -> list[str]:
        return self.translation.split()


class TranslationAnswer(RootModel[list[JudgedTranslation]]):
    """Each translation with its words' severities and its score."""


@dataclass(frozen=True)
class JudgedTranslations:
    """Translations in the order in which they were given."""

    judged: Sequence[JudgedTranslation]

    def to_json(self) -> list[dict[str, Any]]:
        """As `TranslationAnswer` declares them."""
        return [one.model_dump() for one in self.judged]

    def table(self) -> str:
        """A line for each, the worst first, with what is wrong in brackets; and how much is, over all."""
        words = [severity for one in self.judged for severity in one.severities]
        wrong = [severity for severity in words if severity != "ok"]
        kinds = ", ".join(f"{wrong.count(kind)} {kind}" for kind in ("minor", "major", "critical"))
        share, score = len(wrong) / max(1, len(words)), sum(one.score for one in self.judged) / len(self.judged)
        lines = [f"{len(self.judged)} translations, mean score {score:+.3f}, {share:.1%} of words not ok ({kinds})"]
        ordered = sorted(self.judged, key=lambda one: one.score)
        return "\n".join([*lines, *(f"  {one.score:+.3f}  {_marked(one)}" for one in ordered)])


def _marked(one: JudgedTranslation) -> str:
    pairs = zip(one.words, one.severities, strict=True)
    return " ".join(word if severity == "ok" else f"[{word}: {severity}]" for word, severity in pairs)
