"""Graded solutions: several to each question, by the model whose tokens get values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic import model_validator
from transformers import PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.fields import Probability
from ...core.files import read_records
from ...core.schemas import Fields, checked
from ...learned.value_labels import prefix_values, token_value_labels
from ...models.prompts import prompt_ids
from ..preference.pairs import TokenId

__all__ = ["GradedQuestion", "ValueExample", "read_solutions", "shared_tokens", "value_examples"]

REMEDY = (
    'write lines like {"prompt": "...", "solutions": ["...", "..."], "correct": [true, false]}, or with prompt_ids and '
    "solution_ids"
)
ValueExample = dict[str, list[Any]]  # prompt_ids, solution_ids, labels


class GradedQuestion(NamedTuple):
    """A question and its solutions in tokens, the last of which ends the text, with their grades in [0, 1]."""

    prompt_ids: list[int]
    solutions: list[list[int]]
    correct: list[float]


def read_solutions(path: str | Path, tokenizer: PreTrainedTokenizerBase, chat: bool = True) -> list[GradedQuestion]:
    """The questions in a file, a JSON object a line: prompt, solutions (texts) and correct (a grade for each); or
    prompt_ids and solution_ids, as they were drawn, instead of texts.

    Args:
        chat: put text prompts through the chat template. Solutions as text get the end-of-text token; ids stay as they
            are.
    """

    def question(row: dict[str, Any], where: str) -> GradedQuestion:
        if "solution_ids" in row:
            ids = checked(IdSolutions, row, where, REMEDY)
            found = GradedQuestion(ids.prompt_ids, ids.solution_ids, list(map(float, ids.correct)))
        else:
            found = _encoded(checked(TextSolutions, row, where, REMEDY), tokenizer, chat)
        return found

    return read_records(path, "solutions", REMEDY, question)


class Graded(Fields):
    """What both forms have."""

    correct: list[bool | Probability]


class TextSolutions(Graded):
    """A question in words."""

    prompt: str
    solutions: list[str]

    @model_validator(mode="after")
    def _fit(self) -> TextSolutions:
        _check_fit(self.solutions, self.correct)
        if not self.prompt.strip():
            raise ValueError("the prompt is empty")
        return self


class IdSolutions(Graded):
    """A question in tokens."""

    prompt_ids: list[TokenId]
    solution_ids: list[list[TokenId]]

    @model_validator(mode="after")
    def _fit(self) -> IdSolutions:
        _check_fit(self.solution_ids, self.correct)
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty")
        return self


def _check_fit(solutions: Sequence[Sequence[Any]], correct: Sequence[float]) -> None:
    if len(solutions) != len(correct):
        raise ValueError(f"{len(solutions)} solutions have {len(correct)} grades")
    if len(solutions) < 2:
        raise ValueError(f"a question has {len(solutions)} solutions, at least 2 are needed")
    if not all(solutions):
        raise ValueError("a solution is empty")


def _encoded(row: TextSolutions, tokenizer: PreTrainedTokenizerBase, chat: bool) -> GradedQuestion:
    end = [] if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)]
    ids = [tokenizer.encode(text, add_special_tokens=False) + end for text in row.solutions]
    return GradedQuestion(prompt_ids(tokenizer, row.prompt, chat=chat), ids, list(map(float, row.correct)))


def value_examples(questions: Iterable[GradedQuestion], min_count: int = 1) -> list[ValueExample]:
    """An example of each solution, its tokens labeled by `token_value_labels` among those to the same question."""
    made: list[ValueExample] = []
    for number, question in enumerate(questions):
        try:
            labels = token_value_labels(question.solutions, question.correct, min_count)
        except InputError as error:
            raise InputError(f"question {number}: {error}") from None
        made += [
            {"prompt_ids": question.prompt_ids, "solution_ids": ids, "labels": own}
            for ids, own in zip(question.solutions, labels)
        ]
    return made


def shared_tokens(questions: Iterable[GradedQuestion]) -> float:
    """The share of all tokens whose prefix several solutions have: the others' labels are 0 or 1, as the grades."""
    counts = [n for question in questions for n in prefix_values(question.solutions, question.correct).counts]
    return sum(int((n > 1).sum()) for n in counts) / sum(map(len, counts))
