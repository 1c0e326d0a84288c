"""Texts whose concepts are known: "a : b = c : d", their pairs and loose words, and what is left to say."""

from __future__ import annotations

from typing import NamedTuple

from ...core.errors import InputError
from ...learned.hyper_probe import Pair

__all__ = ["Document", "documents_in"]


class Document(NamedTuple):
    """What the model reads, `prompt`, is the text without its last word."""

    prompt: str
    pairs: tuple[Pair, ...]
    words: tuple[str, ...]

    @property
    def concepts(self) -> list[str]:
        return [word for pair in self.pairs for word in pair] + list(self.words)


def documents_in(text: str, source: str) -> list[Document]:
    """One document for each line that is not blank.

    Raises:
        InputError: no line, or one that is not of this form; it is named.
    """
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if len(lines) < 2:
        raise InputError(f"{source!r} has {len(lines)} lines with text; give at least two such as 'a : b = c : d'")
    return [_document(line, f"line {number} of {source!r}") for number, line in lines]


def _document(line: str, where: str) -> Document:
    groups = [[word.strip().lower() for word in part.split(":")] for part in line.split("=")]
    if any(len(group) > 2 or not all(group) for group in groups) or sum(map(len, groups)) < 2:
        raise InputError(f"{where} is {line[:60]!r}; give pairs and words such as 'a : b = c : d' or 'a : b = c'")
    last = max(line.rfind(":"), line.rfind("="))
    pairs = tuple((group[0], group[1]) for group in groups if len(group) == 2)
    return Document(line[: last + 1], pairs, tuple(group[0] for group in groups if len(group) == 1))
