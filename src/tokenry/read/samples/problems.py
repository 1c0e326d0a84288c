"""Questions with answers that can be checked, from a file or from a task that draws them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ...core.errors import InputError
from ...core.files import is_number, records_of
from ...data.problems import Arithmetic, draw_problems
from ...text.answers import find_answer, normalise_answer

__all__ = ["Problems", "problems_in", "sums"]


class Problems(NamedTuple):
    """Questions, and whether a text answers number i rightly."""

    questions: Sequence[str]
    is_correct: Callable[[int, str], bool]


def sums(count: int) -> Problems:
    """Sums of every level of difficulty."""
    task = Arithmetic()
    drawn = draw_problems(task, count, split="train")
    return Problems([problem.question for problem in drawn], lambda i, text: task.check(drawn[i], text))


def problems_in(text: str, path: str, marker: str) -> Problems:
    """The problems of a file of JSON lines; an answer is right if what the marker finds is the same."""
    remedy = 'give both as text, in lines like {"question": "...", "answer": "..."}'
    rows = records_of(text, path, "problems", remedy, _problem_of)

    def is_correct(index: int, text: str) -> bool:
        span = find_answer(text, marker)
        return span is not None and normalise_answer(text[slice(*span)]) == normalise_answer(rows[index][1])

    return Problems([question for question, _ in rows], is_correct)


def _problem_of(row: dict[str, Any], where: str) -> tuple[str, str]:
    """Question and answer of one line."""
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip() or not (isinstance(answer, str) or is_number(answer)):
        raise InputError(f"{where} has the question {question!r} and the answer {answer!r}; give both as text")
    return question, str(answer)
