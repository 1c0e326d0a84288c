"""Logs of lm-eval and inspect_ai as results: a row for every answer to a question, at one level of effort."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.files import as_text, explained, is_number, parse_json, records_of, shown
from ...core.schemas import Fields, checked
from .results import ResultRow

__all__ = ["read_log"]

REMEDY = "give a log of inspect_ai (.eval or .json) or the samples_*.jsonl of lm-eval"
GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0, "yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}  # of inspect_ai
ZSTANDARD = 93  # the compression of its newer logs


class Answer(NamedTuple):
    """An answer to a question: its scores by their names, and the tokens that were generated for it."""

    question: str
    scores: dict[str, float]
    tokens: float


def read_log(
    path: str | Path,
    level: str | float,
    score: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[ResultRow]:
    """The answers of a log at one level of effort, for `Results.from_rows` together with those of other levels.

    Questions are told apart by their number and what they ask, so that another question of the same number is another
    one. Several epochs of inspect_ai are several rows.

    Args:
        path: of inspect_ai, .eval or .json, or of lm-eval, samples_*.jsonl (written with --log_samples).
        score: which one counts, where a log has several: of lm-eval as in its results, "exact_match,strict-match"; of
            inspect_ai the scorer, "match", or "scorer/key" where it gives several values. It lies in [0, 1].
        tokenizer: of the model that was asked, which counts the tokens of lm-eval's answers: its logs do not say them.
            Those of inspect_ai do, as the output tokens of the evaluated model.

    Raises:
        InputError: no such log, one that was not finished, several scores or none, one outside [0, 1], an answer
            without its score or tokens, or several responses to one score.
    """
    name = str(path)
    with explained(f"the log {name!r} cannot be read", REMEDY):
        data = Path(path).read_bytes()
    if data.startswith(b"PK"):
        answers = _archived(path, name)
    else:
        with explained(f"the log {name!r} cannot be read", REMEDY):
            text = as_text(data)
        answers = _harness(text, name, tokenizer) if _is_lines(text) else _inspected(_whole(text, name), name)
    chosen = _chosen(answers, score, name)
    return [_row(answer, level, chosen, name) for answer in answers]


def _chosen(answers: Sequence[Answer], score: str | None, name: str) -> str:
    known = list(dict.fromkeys(key for answer in answers for key in answer.scores))
    if score is None and len(known) == 1:
        return known[0]
    if not known or (score is not None and score not in known):
        raise InputError(f"the log {name!r} has no score {score or 'that is a number'!r}; it has {known or 'none'}")
    if score is None:
        raise InputError(
            f"the log {name!r} has the scores {', '.join(map(repr, known))}; choose one, score={known[0]!r}"
        )
    return score


def _row(answer: Answer, level: str | float, score: str, name: str) -> ResultRow:
    where = f"the question {answer.question[:40]!r} of the log {name!r}"
    if score not in answer.scores:
        raise InputError(f"{where} has no score {score!r}; leave it out, or score it")
    tokens = max(1.0, answer.tokens)  # what ends at once has written the end of the text
    row = {"question": answer.question, "level": level, "accuracy": answer.scores[score], "tokens": tokens}
    return checked(ResultRow, row, where, f"give a score in [0, 1]; {score!r} is none")


# --- lm-eval -------------------------------------------------------------------------------------------------------


class HarnessRow(Fields):
    """A line of samples_*.jsonl: a question with one way to filter its responses."""

    doc_id: int
    doc_hash: str
    resps: list[list[str]]
    filter: str
    metrics: list[str]


def _is_lines(text: str) -> bool:
    """Whether a text is lm-eval's: a JSON object a line. A log of inspect_ai is one object of many lines."""
    first = text.lstrip().partition("\n")[0].strip()
    return first.startswith("{") and first.endswith("}") and '"doc_id"' in first


def _harness(text: str, name: str, tokenizer: PreTrainedTokenizerBase | None) -> list[Answer]:
    """One answer a question, with the scores of all filters."""
    remedy = "give the samples_*.jsonl of a task of lm-eval that generates"
    rows = records_of(text, name, "samples", remedy, lambda row, where: checked(HarnessRow, row, where, remedy))
    if tokenizer is None:
        raise InputError(f"the log {name!r} of lm-eval says no tokens; give the tokenizer of its model{_model(name)}")
    found: dict[str, Answer] = {}
    for row in rows:
        texts = [text for one in row.resps for text in one]
        if len(texts) != 1:
            raise InputError(f"question {row.doc_id} of {name!r} has {len(texts)} responses to a score; give one each")
        question = f"{row.doc_id} {row.doc_hash[:12]}"
        count = len(tokenizer.encode(texts[0], add_special_tokens=False))
        answer = found.setdefault(question, Answer(question, {}, count))
        values = row.model_extra or {}
        answer.scores.update(
            {f"{metric},{row.filter}": float(values[metric]) for metric in row.metrics if _is_score(values.get(metric))}
        )
    return list(found.values())


def _model(name: str) -> str:
    """What the results beside the samples say of the model, in brackets."""
    samples = Path(name)
    (*_, stamp) = samples.stem.rsplit("_", 1)
    try:
        model = parse_json(as_text((samples.parent / f"results_{stamp}.json").read_bytes()))["model_name"]
    except (OSError, ValueError, LookupError, TypeError):
        return ""
    return f" ({shown(model)})"


def _is_score(value: Any) -> bool:
    return isinstance(value, bool) or is_number(value)


# --- inspect_ai ----------------------------------------------------------------------------------------------------


class Evaluated(Fields):
    model: str


class Header(Fields):
    """What a log says of itself."""

    status: str
    eval: Evaluated


class Usage(Fields):
    output_tokens: int = Field(ge=0)


class Graded(Fields):
    value: Any


class Asked(Fields):
    """A question of a log, in one epoch."""

    id: int | str
    input: str | list[dict[str, Any]]
    scores: dict[str, Graded] | None = None
    model_usage: dict[str, Usage] = Field(default_factory=dict)


def _whole(text: str, name: str) -> tuple[Any, Iterator[Any]]:
    """Header and samples of a log that is one JSON object."""
    with explained(f"the log {name!r} cannot be read", REMEDY):
        log = parse_json(text)
    if not isinstance(log, dict) or not isinstance(log.get("samples"), list):
        raise InputError(f"the file {name!r} holds no samples; {REMEDY}, written with its samples")
    return log, iter(log["samples"])


def _archived(path: str | Path, name: str) -> list[Answer]:
    """The answers of a log that is an archive with a file a sample."""
    with explained(f"the log {name!r} cannot be read", REMEDY, zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        broken = _zstandard(name) if any(i.compress_type == ZSTANDARD for i in archive.infolist()) else ()
        listed = archive.namelist()
        if "header.json" not in listed:
            raise InputError(f"the log {name!r} has no header; {REMEDY}, of an evaluation that is finished")

        def read(file: str) -> Any:
            with explained(f"{file!r} in the log {name!r} cannot be read", REMEDY, zipfile.BadZipFile, *broken):
                return parse_json(as_text(archive.read(file)))

        samples = (read(file) for file in listed if file.startswith("samples/"))
        return _inspected((read("header.json"), samples), name)


def _zstandard(name: str) -> tuple[type[Exception], ...]:
    """Make `zipfile` read this compression, which Python has from 3.14 on; gives what broken data raises."""
    if sys.version_info >= (3, 14):
        return (import_module("compression.zstd").ZstdError,)
    try:
        import_module("zipfile_zstd")  # registers itself
        return (import_module("zstandard").ZstdError,)
    except ModuleNotFoundError:
        raise InputError(
            f"the log {name!r} is compressed by zstandard; run `pip install tokenry[logs]`, or convert it with "
            "`inspect log convert --to json`"
        ) from None


def _inspected(log: tuple[Any, Iterator[Any]], name: str) -> list[Answer]:
    header = checked(Header, log[0], f"the log {name!r}", REMEDY)
    if header.status != "success":
        raise InputError(
            f"the evaluation of the log {name!r} has the status {header.status!r}; give one that succeeded"
        )
    answers = [_asked(one, header.eval.model, f"sample {n} of the log {name!r}") for n, one in enumerate(log[1], 1)]
    if not answers:
        raise InputError(f"the log {name!r} holds no samples; {REMEDY}, written with its samples")
    return answers


def _asked(row: Any, model: str, where: str) -> Answer:
    sample = checked(Asked, row, where, REMEDY)
    if model not in sample.model_usage:
        raise InputError(f"{where} says no tokens of the model {model!r}; run it again without a cache")
    given = sample.input if isinstance(sample.input, str) else _last_text(sample.input)
    graded = (sample.scores or {}).items()
    scores = {key: value for name, one in graded for key, value in _values(name, one.value)}
    return Answer(f"{sample.id} {given}", scores, sample.model_usage[model].output_tokens)


def _last_text(messages: Sequence[dict[str, Any]]) -> str:
    texts = [message["content"] for message in messages if isinstance(message.get("content"), str)]
    return texts[-1] if texts else ""


def _values(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers of a scorer by their names: its own, or `scorer/key` of several."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _values(f"{name}/{key}", one)
    elif isinstance(value, str) and value in GRADES:
        yield name, GRADES[value]
    elif _is_score(value):
        yield name, float(value)
