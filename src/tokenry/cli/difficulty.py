"""How `tokenry read` learns a difficulty probe: problems, samples of the model, labels, fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..core.errors import InputError
from ..core.files import is_number, records_of
from ..core.outputs import check_folder, write_folder
from .options import load_model, progress, read_text

if TYPE_CHECKING:
    from ..read import DifficultyProbeMethod, Reading


class Problems(NamedTuple):
    """Questions, and whether a text answers number i rightly."""

    questions: Sequence[str]
    is_correct: Callable[[int, str], bool]


def learn_probe(
    method: DifficultyProbeMethod,
    model_options: Sequence[Any],
    path: str | None,
    count: int | None,
    marker: str,
    max_new_tokens: int,
    folder: str | None,
    force: bool,
) -> list[Reading]:
    """Train a probe and save it. Returns what the samples say of each class."""
    if (path is None) == (count is None):
        raise InputError("say what to learn from: a file of problems with --problems, or --arithmetic N")
    if folder is None:
        raise InputError("there is no place for the probe; give a folder with --save")
    check_folder(folder, force)
    problems = sums(count) if path is None else read_problems(path, marker)
    model, tokenizer = load_model(*model_options)
    with progress("samples", len(problems.questions)) as update:
        options = {"progress": lambda done, total: update(completed=done)}
        profile = method.profile(model, tokenizer, *problems, max_new_tokens, **options)
    labels = method.labels(profile)
    probe = method.fit(model, tokenizer, problems.questions, labels)
    write_folder(folder, probe.save, force)
    click.echo(f"probe: {folder}; right on {probe.held_out_accuracy:.0%} of the questions held out", err=True)
    return [by_class(profile, labels)]


def by_class(profile: Any, labels: Sequence[int]) -> Reading:
    from ..learned.difficulty_probe import CLASSES
    from ..read import Reading

    rows = [{"class": CLASSES[row.pop("level")], **row} for row in profile.reading(labels).rows]
    return Reading("the model's own samples, by class", rows)


def sums(count: int) -> Problems:
    """Sums of every level of difficulty."""
    from ..data.problems import Arithmetic, draw_problems

    task = Arithmetic()
    drawn = draw_problems(task, count, split="train")
    return Problems([problem.question for problem in drawn], lambda i, text: task.check(drawn[i], text))


def read_problems(path: str, marker: str) -> Problems:
    """The problems of a file of JSON lines; an answer is right if what the marker finds is the same."""
    from ..text.answers import check_marker, find_answer, normalise_answer

    check_marker(marker)
    remedy = 'give both as text, in lines like {"question": "...", "answer": "..."}'
    text = read_text(path, "file of problems")
    rows = records_of(text, path, "problems", remedy, problem_of)

    def is_correct(index: int, text: str) -> bool:
        span = find_answer(text, marker)
        return span is not None and normalise_answer(text[slice(*span)]) == normalise_answer(rows[index][1])

    return Problems([question for question, _ in rows], is_correct)


def problem_of(row: dict[str, Any], where: str) -> tuple[str, str]:
    """Question and answer of one line."""
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question.strip() or not (isinstance(answer, str) or is_number(answer)):
        raise InputError(f"{where} has the question {question!r} and the answer {answer!r}; give both as text")
    return question, str(answer)
