"""judge: results over levels of effort, from lines and from the logs of evaluation harnesses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..core.errors import InputError
from ..core.files import records_of
from ..core.outputs import check_file, write_text
from .options import as_json, load_reader, read_text, refuse_unused, say

if TYPE_CHECKING:
    from ..judge.contract import ResultsMethod
    from ..judge.scaling.results import ResultRow

__all__ = ["ResultsReader", "judge_results"]


def judge_results(
    method: ResultsMethod, rows: Iterable[ResultRow], report: str | None, force: bool, json_output: bool
) -> None:
    """Judge the rows of all files together."""
    from ..judge.scaling.results import Results

    if report:
        check_file(report, force)
    said = method.judge(Results.from_rows(rows))
    if report:
        write_text(report, said.picture())
        click.echo(f"picture: {report}", err=True)
    as_json(said.to_json()) if json_output else say(said.table())


class ResultsReader:
    """Reads results from files of lines and, written LEVEL=PATH, from logs.

    Args:
        score, tokenizer: see `read_log`; they are refused where no log is given.
    """

    def __init__(self, files: Sequence[str], score: str | None, tokenizer: str | None, trust: bool) -> None:
        self.files = [level_and_path(name) for name in files]
        logs = [path for level, path in self.files if level is not None]
        if not logs:
            refuse_unused(("--score", "--tokenizer"), "without a log, LEVEL=PATH")
        if tokenizer is None:
            refuse_unused(("--trust-remote-code",), "without --tokenizer")
        self.score = score
        self.tokenizer = None if tokenizer is None else load_reader(tokenizer, trust)

    def rows(self) -> Iterator[ResultRow]:
        """Of all files."""
        from ..judge.scaling.logs import read_log

        for level, path in self.files:
            yield from read_results(path) if level is None else read_log(path, level, self.score, self.tokenizer)


def level_and_path(name: str) -> tuple[str | float | None, str]:
    """The level of a log and its path; a file of lines says its levels itself."""
    level, equals, path = name.partition("=")
    if not equals or Path(name).exists():
        return None, name
    if not level or not path:
        raise InputError(f"{name!r} is not LEVEL=PATH; write for example low=logs/low.eval")
    for kind in (int, float):
        with suppress(ValueError):
            return kind(level), path
    return level, path


def read_results(path: str) -> list[ResultRow]:
    """The results of a file of JSON lines."""
    from ..core.schemas import checked
    from ..judge.scaling.results import ResultRow

    remedy = 'write lines like {"question": "...", "level": 1, "accuracy": 0.5, "tokens": 120}, or a log as LEVEL=PATH'
    text = read_text(path, "file of results")
    return records_of(text, path, "results", remedy, lambda row, where: checked(ResultRow, row, where, remedy))
