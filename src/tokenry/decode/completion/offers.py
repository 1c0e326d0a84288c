"""What an editor is offered at a place of a source file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...text.code.scopes import Scope

__all__ = ["Completion"]


@dataclass(frozen=True)
class Completion:
    """A completion; its text begins with the part of a name that is typed already.

    Attributes:
        kind: a name, or the whole rest of the statement.
        probability: that the model gives it.
        score: by which it is ranked; it may exceed 1.
        scope: from where the name is visible, if it is.
        source: re-ranked where its scope has changed the score; else model.
    """

    text: str
    kind: Literal["name", "statement"]
    probability: float
    score: float
    scope: Scope | None
    source: Literal["model", "re-ranked"]
