"""Text that ships in packages: licenses, and Python's own library as documentation and as code."""

from __future__ import annotations

import ast
import importlib.util
import random
import re
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from ..core.errors import InputError

__all__ = [
    "docstrings",
    "library_files",
    "library_source",
    "license_texts",
    "overlap",
    "split",
    "up_to_bytes",
    "word_grams",
]

T = TypeVar("T")

FRONT_MATTER = re.compile(r"\A---\n.*?^---[ \t]*$\n?", re.DOTALL | re.MULTILINE)
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def license_texts() -> list[str]:
    """About 2,600 licenses from the package scancode-toolkit-mini, sorted by name, each text once.

    The package is read as data and never imported, as its own dependencies need not be there.

    Raises:
        InputError: it is not installed.
    """
    spec = importlib.util.find_spec("licensedcode")
    folder = Path(next(iter(spec.submodule_search_locations or []), "")) / "data" / "licenses" if spec else None
    paths = sorted(folder.glob("*.LICENSE")) if folder else []
    if not paths:
        raise InputError(
            "the license texts are not installed; run `pip install --no-deps scancode-toolkit-mini` (data only)"
        )
    texts = (FRONT_MATTER.sub("", path.read_text(encoding="utf-8", errors="replace")).strip() for path in paths)
    return list(dict.fromkeys(text for text in texts if text))


def library_files() -> dict[Path, str]:
    """{file: its package} of Python's standard library, without tests, sorted by path. A module that stands alone is
    a package of its own."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parts = {path: path.relative_to(library).parts for path in sorted(library.rglob("*.py"))}
    return {path: names[0].removesuffix(".py") for path, names in parts.items() if LEFT_OUT.isdisjoint(names)}


def library_source() -> list[str]:
    """Every module of Python's standard library as code, without tests, sorted by path."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in library_files()]


def docstrings() -> list[str]:
    """The docstrings of each module of Python's standard library, one document a module."""
    found = []
    for source in library_source():
        nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, DEFINITIONS))
        found.append("\n\n".join(text for node in nodes if (text := ast.get_docstring(node))))
    return [text for text in found if text]


def split(documents: Sequence[T], share: float = 0.8, seed: int = 0) -> tuple[list[T], list[T]]:
    """(training, held-out) documents, shuffled with a seed."""
    shuffled = list(documents)
    random.Random(seed).shuffle(shuffled)
    cut = int(share * len(shuffled))
    return shuffled[:cut], shuffled[cut:]


def up_to_bytes(documents: Sequence[str], size: int) -> list[str]:
    """The first documents that together fill `size` bytes of UTF-8; the last one is cut there."""
    kept, left = [], size
    for document in documents:
        data = document.encode()[:left]
        kept.append(data.decode(errors="ignore"))
        left -= len(data)
        if not left:
            break
    return kept


def word_grams(text: str, n: int = 20) -> set[int]:
    """Hashes of all stretches of n words, lower-cased; a shorter text is one stretch."""
    words = text.lower().split()
    return {hash(tuple(words[i : i + n])) for i in range(max(1, len(words) - n + 1))}


def overlap(text: str, seen: Iterable[int]) -> float:
    """Share of the 20-word stretches of `text` that are among `seen`."""
    grams = word_grams(text)
    return len(grams.intersection(seen)) / len(grams)
