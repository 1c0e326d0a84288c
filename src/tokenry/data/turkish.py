"""Turkish sentences with the borders inside their words: the Turkish Web Treebank of the package turkish-treebanks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, files
from typing import NamedTuple

from ..core.errors import InputError

__all__ = ["Sentence", "turkish_sentences"]

FORM, RELATION, MISC = 1, 7, 9  # columns of CoNLL-U


class Sentence(NamedTuple):
    """A text and its words, each as the parts that the treebank cuts it into where it is derived of another word."""

    text: str
    words: list[list[str]]


def turkish_sentences() -> list[Sentence]:
    """4,851 sentences from the web and from Wikipedia (Apache-2.0), in the order of the package.

    The package is read as data and never imported.

    Raises:
        InputError: it is not installed.
    """
    try:
        paths = [path for path in files("turkish-treebanks") or () if path.suffix == ".conllu"]
    except PackageNotFoundError:
        paths = []
    if not paths:
        raise InputError("the Turkish treebank is not installed; run `pip install --no-deps turkish-treebanks` (data)")
    lines = (line for path in sorted(paths) for line in path.read_text(encoding="utf-8").split("\n"))
    return list(_sentences(lines))


def _sentences(lines: Iterable[str]) -> Iterator[Sentence]:
    text, words, joined = "", [], False
    for line in lines:
        if line.startswith("# text = "):
            text = line.removeprefix("# text = ")
        elif not line and words:
            yield Sentence(text, words)
            words, joined = [], False
        elif line[:1].isdigit():
            columns = line.split("\t")
            if joined:
                words[-1].append(columns[FORM])
            else:
                words.append([columns[FORM]])
            joined = columns[RELATION] == "ig" and "SpaceAfter=No" in columns[MISC]
