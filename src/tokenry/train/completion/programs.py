"""Programs to learn from: files of a folder as their two views, each once."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ...core.errors import InputError
from ...core.files import read_text
from ...text.code.javascript import check_reader
from ...text.code.languages import ENDINGS, language_of
from ...text.code.views import CodeViews, code_views

__all__ = ["Program", "programs_of", "read_programs"]

logger = logging.getLogger(__name__)


class Program(NamedTuple):
    """A file: its name, the package that it belongs to, and its views."""

    name: str
    package: str
    views: CodeViews


def read_programs(path: str | Path, seed: int) -> list[Program]:
    """The programs of a folder, or of one file, package by package in random order, so that the first ones can be held
    out with their packages. A package is what lies directly in the folder, a file or a folder.

    Raises:
        InputError: there is no program that can be read, or what reads JavaScript is not installed and there is no
            Python beside it.
    """
    root = Path(path)
    files = _readable(sorted(_files(root))) if root.is_dir() else [root]
    programs = programs_of((file, _package(file, root)) for file in files)
    if not programs:
        raise InputError(
            f"{str(path)!r} holds no Python or JavaScript program that can be read; give a folder with some, or a file"
        )
    packages = sorted({program.package for program in programs})
    random.Random(seed).shuffle(packages)
    order = {package: place for place, package in enumerate(packages)}
    return sorted(programs, key=lambda program: order[program.package])


def _files(root: Path) -> Iterable[Path]:
    return (file for ending in ENDINGS for file in root.rglob(f"*{ending}"))


def _readable(files: list[Path]) -> list[Path]:
    """The files of languages that can be read here; a warning tells of the others, once."""
    python = [file for file in files if language_of(file.name) == "python"]
    if len(python) < len(files):
        try:
            check_reader()
        except InputError as refusal:
            if not python:
                raise
            logger.warning(f"{len(files) - len(python)} files of JavaScript are left out: {refusal}")
            return python
    return files


def programs_of(files: Iterable[tuple[Path, str]]) -> list[Program]:
    """The programs of files with their packages. One that cannot be read is left out, which the log says, and so is a
    copy of another."""
    found: dict[Sequence[str], Program] = {}
    for file, package in files:
        try:
            views = code_views(read_text(file, "program", "leave it out"), str(file))
        except InputError as refusal:
            logger.warning(f"left out: {refusal}")
            continue
        found.setdefault(views.values, Program(str(file), package, views))
    return list(found.values())


def _package(file: Path, root: Path) -> str:
    first = file if file == root else root / file.relative_to(root).parts[0]
    return first.stem if first.suffix in ENDINGS else first.name
