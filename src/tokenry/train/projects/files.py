"""The source files of a software project, as token ids in windows.

Paper: Exploring and Evaluating Personalized Models for Code Generation, arXiv 2208.13928.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ...core.errors import InputError

__all__ = ["SUFFIXES", "SourceFile", "read_project", "tokens_of", "windows"]

SUFFIXES = (
    ".c .cc .cpp .cs .go .h .hpp .java .js .jsx .jl .kt .lua .php .pl .py .r .rb .rs .scala .sh .sql .swift .ts .tsx"
).split()
LARGEST = 10**6  # bytes: what is larger is data, or made by a machine
FEWEST = 2  # files: some are held out


class SourceFile(NamedTuple):
    """A file by its path within the project, and its token ids."""

    name: str
    ids: list[int]


def read_project(folder: str | Path, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> list[SourceFile]:
    """The source files below a folder, in random order.

    Hidden folders and files, links, files above 1 MB, files that are no UTF-8, empty ones and copies of others are left
    out.

    Raises:
        InputError: no folder, or fewer than two such files, which cannot be split.
    """
    if not Path(folder).is_dir():
        raise InputError(f"there is no folder {str(folder)!r}; give the folder of a software project")
    names: dict[str, str] = {}
    for name, text in found(Path(folder)):
        names.setdefault(text, name)  # of copies one is enough
    if len(names) < FEWEST:
        raise InputError(
            f"{str(folder)!r} has {len(names)} source files, of which some must be held out; give a project with at "
            f"least {FEWEST} ({', '.join(SUFFIXES[:6])}, ...)"
        )
    ids = tokenizer(list(names), add_special_tokens=False, verbose=False).input_ids
    files = [SourceFile(name, row) for name, row in zip(names.values(), ids, strict=True)]
    random.Random(seed).shuffle(files)
    return files


def found(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and text of the source files, by their names."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place) / name
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES or path.is_symlink():
                continue
            if path.stat().st_size > LARGEST:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip():
                yield path.relative_to(folder).as_posix(), text


def windows(files: Sequence[SourceFile], length: int) -> list[list[int]]:
    """Pieces of at most `length` tokens, file by file; those without a next token to learn are left out."""
    pieces = (file.ids[start : start + length] for file in files for start in range(0, len(file.ids), length))
    return [piece for piece in pieces if len(piece) > 1]


def tokens_of(files: Sequence[SourceFile], count: int) -> list[int]:
    """The first `count` tokens of the files, one after another."""
    ids: list[int] = []
    for file in files:
        ids += file.ids[: count - len(ids)]
        if len(ids) == count:
            return ids
    raise InputError(f"the project has {len(ids)} tokens, fewer than {count}; give a larger one, or a shorter prefix")
