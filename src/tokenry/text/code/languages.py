"""The languages of programs: which one a file is in, and its keywords."""

from __future__ import annotations

import keyword
from pathlib import PurePath
from typing import Literal

__all__ = ["ENDINGS", "KEYWORDS", "Language", "language_of"]

Language = Literal["python", "javascript"]
ENDINGS: dict[str, Language] = {
    ".py": "python",
    ".js": "javascript",
    ".mjs": "javascript",
    ".cjs": "javascript",
    ".jsx": "javascript",
}
JAVASCRIPT = """await break case catch class const continue debugger default delete do else export extends false finally
for function if import in instanceof new null return super switch this throw true try typeof var void while with
yield""".split()
KEYWORDS: dict[Language, frozenset[str]] = {  # those that are never names
    "python": frozenset(keyword.kwlist),
    "javascript": frozenset(JAVASCRIPT),
}


def language_of(name: str) -> Language:
    """The language of a file by the ending of its name; Python where that says nothing."""
    return ENDINGS.get(PurePath(name).suffix.lower(), "python")
