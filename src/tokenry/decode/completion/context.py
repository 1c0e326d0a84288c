"""What stands left of a cursor: the text of the model's prompt, the part of a name already typed, and visible names."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from ...core.errors import InputError
from ...text.code.javascript import left_of_cursor
from ...text.code.languages import KEYWORDS, Language
from ...text.code.lexer import INDENT, lenient_tokens
from ...text.code.scopes import Names, VisibleNames, name_kind

__all__ = ["LeftContext", "left_of", "offset_of", "rendered", "typed_before"]

TYPED = re.compile(r"[^\W\d]\w*\Z")
LONGEST = 1000  # characters of a name
SPACED = {"=", "+", "-", "*", "/", "==", "!=", "<", ">", "<=", ">=", "->", "|", "&", "+=", "-=", ":=", "%", "//", "**"}
SPACED |= {"===", "!==", "=>", "&&", "||", "??", "?"}
PLACEHOLDERS = {"<STRING>": '""', "<NUMBER>": "0"}


@dataclass(frozen=True)
class LeftContext:
    """Source up to a cursor.

    Attributes:
        source: up to the name that is being typed.
        typed: the part of that name that is there.
        values: the values of the source, see `tokenry.text.code.lexer`; None where the cursor stands in a string or
            comment, where nothing is completed.
        language: of the source.
    """

    source: str
    typed: str
    values: tuple[str, ...] | None
    language: Language = "python"

    @cached_property
    def visible(self) -> Names:
        if self.language == "javascript":
            return left_of_cursor(self.source)[1]
        return VisibleNames(self.values or ())

    @property
    def before(self) -> str | None:
        """The value left of the cursor's name."""
        return self.values[-1] if self.values else None

    def kind(self, value: str) -> str:
        """What a completion is: a keyword, or a kind of name."""
        if value in KEYWORDS[self.language] and self.before not in (".", "?."):
            return "keyword"
        return name_kind(self.before, self.visible.is_function(value))


def left_of(source: str, offset: int | None = None, language: Language = "python") -> LeftContext:
    """What stands left of a character of any source, which need not be complete or right.

    Raises:
        InputError: what reads the language is not installed.
    """
    source = source[:offset]
    typed = typed_before(source)
    left = source[: len(source) - len(typed)]
    if language == "javascript":
        return LeftContext(left, typed, left_of_cursor(left)[0], language)
    marked = lenient_tokens(left + "_")  # a name at the cursor, so that blocks are those of its line
    at_cursor = marked and marked[-1].value == "_" and marked[-1].kind == "NAME" and _place(left) == marked[-1][2:]
    return LeftContext(left, typed, tuple(token.value for token in marked[:-1]) if at_cursor else None)


def typed_before(source: str) -> str:
    """The part of a name that a source ends with."""
    found = TYPED.search(source[-LONGEST:])
    return found.group() if found else ""


def _place(left: str) -> tuple[int, int]:
    return left.count("\n") + 1, len(left) - (left.rfind("\n") + 1)


def offset_of(source: str, line: int, column: int, name: str) -> int:
    """The character at a line and column, which count from 1; the column behind the last character is one, too.

    Raises:
        InputError: there is no such place.
    """
    lines = source.split("\n")
    if not 1 <= line <= len(lines):
        raise InputError(f"{name} has no line {line}; give one of 1 to {len(lines)}")
    if not 1 <= column <= len(lines[line - 1]) + 1:
        raise InputError(f"line {line} of {name} has no column {column}; give one of 1 to {len(lines[line - 1]) + 1}")
    return sum(len(one) + 1 for one in lines[: line - 1]) + column - 1


def rendered(values: tuple[str, ...]) -> str:
    """Values of a statement as text; what was a string or number is an empty one."""
    text, before = "", ""
    for value in values:
        if value.startswith("<") and value not in PLACEHOLDERS and value.endswith(">") and len(value) > 2:
            if value == INDENT:
                continue
            break
        word = PLACEHOLDERS.get(value, value)
        text += " " if text and _apart(before, value) else ""
        text, before = text + word, value
    return text


def _apart(before: str, value: str) -> bool:
    """Whether a space stands between two values."""
    if before in SPACED or value in SPACED or before in (",", ":", ";") or (before, value) == (")", "{"):
        return True
    wordy = before[-1:].isalnum() or before[-1:] in "_>"
    return wordy and (value[0].isalnum() or value[0] in "_<")
