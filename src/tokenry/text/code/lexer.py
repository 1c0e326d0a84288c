"""Tokens of Python, with ends of statements and borders of blocks as tokens of their own.

Comments, blank lines and triple-quoted strings are left out; any other string is one token, and so is a number.
`strict_tokens` is Python's own tokenizer; `lenient_tokens` reads text that is broken, or that ends anywhere, and gives
the same tokens where both can read.
"""

from __future__ import annotations

import io
import re
import token as kinds
import tokenize
from collections.abc import Iterable, Iterator
from typing import NamedTuple

__all__ = [
    "DEDENT",
    "EOS",
    "INDENT",
    "NUMBER",
    "SPECIAL",
    "STRING",
    "CodeToken",
    "lenient_tokens",
    "statements",
    "strict_tokens",
]

STRING, NUMBER, INDENT, DEDENT, EOS = SPECIAL = ("<STRING>", "<NUMBER>", "<INDENT>", "<DEDENT>", "<EOS>")
F_STRINGS = {  # {what begins one: what ends it}, tokens of Python 3.12 and 3.14
    getattr(kinds, f"{kind}STRING_START"): getattr(kinds, f"{kind}STRING_END")
    for kind in "FT"
    if hasattr(kinds, f"{kind}STRING_START")
}
OPS = sorted((op for op in kinds.EXACT_TOKEN_TYPES if op != "!"), key=len, reverse=True)
LEXEMES = re.compile(
    r"""
      (?P<skip>[ \t\f]+|\#[^\n]*|\\\n)
    | (?P<newline>\n)
    | (?P<triple>(?i:[rbuft]{0,2})(?:'''(?:\\.|(?!''').)*(?:'''|$)|\"{3}(?:\\.|(?!\"{3}).)*(?:\"{3}|$)))
    | (?P<string>(?i:[rbuft]{0,2})(?:'(?:\\[\s\S]|[^'\\\n])*(?:'|(?=\n)|$)|"(?:\\[\s\S]|[^"\\\n])*(?:"|(?=\n)|$)))
    | (?P<number>0[xXoObB][\da-fA-F_]+|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d[\d_]*)?[jJ]?)
    | (?P<name>[^\W\d]\w*)
    | (?P<op>"""
    + "|".join(map(re.escape, OPS))
    + r""")
    | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL,
)
BEGINS = re.compile(  # a line before which no bracket can be open
    r"[ \t]*(?:(?:async[ \t]+)?def[ \t]+\w|class[ \t]+\w+[ \t]*[(:]|import[ \t]+\w|from[ \t]+[\w.]+[ \t]+import\b"
    r"|(?:return|raise|with|while|del|assert|pass|break|continue)\b(?![ \t]*[=,)])|try:|finally:|@\w)"
)


class CodeToken(NamedTuple):
    """A token: its value, its kind (NAME, STRING, NUMBER, OP, INDENT, DEDENT or EOS), and where it begins.

    `line` counts from 1 and `column`, in characters, from 0.
    """

    value: str
    kind: str
    line: int
    column: int


class _Lexeme(NamedTuple):
    """As read; a triple-quoted string is DROPPED, the end of a logical line NEWLINE. `indent` stands left of it."""

    value: str
    kind: str
    line: int
    column: int
    indent: str


def strict_tokens(source: str) -> list[CodeToken]:
    """The tokens of source that Python reads.

    Raises:
        SyntaxError, tokenize.TokenError: it does not.
    """
    return list(_marked(_read(tokenize.generate_tokens(io.StringIO(source).readline))))


def lenient_tokens(source: str) -> list[CodeToken]:
    """The tokens of any text. A string that is not closed ends with its line, and a bracket that is not closed before a
    line that can only begin a statement."""
    return list(_marked(_scanned(source)))


def statements(values: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """(first, end) of every statement: values[first:end] holds no border of a block and ends with the mark for it."""
    first = 0
    for i, value in enumerate(values):
        if value in (INDENT, DEDENT):
            first = i + 1
        elif value == EOS:
            yield first, i + 1
            first = i + 1


# --- reading -------------------------------------------------------------------------------------------------------


def _read(tokens: Iterator[tokenize.TokenInfo]) -> Iterator[_Lexeme]:
    """What Python's tokenizer gives; an f-string is one string, whatever is in it."""
    for one in tokens:
        (line, column), kind = one.start, one.type
        triple = one.string.lstrip("rbuftRBUFT")[:3] in ("'''", '"""')
        if kind in F_STRINGS:
            _skip(tokens, F_STRINGS[kind], kind)
            kind = kinds.STRING
        indent = one.line[:column]
        if kind == kinds.STRING:
            yield _Lexeme(STRING, "DROPPED" if triple else "STRING", line, column, indent)
        elif kind == kinds.NUMBER:
            yield _Lexeme(NUMBER, "NUMBER", line, column, indent)
        elif kind in (kinds.NAME, kinds.OP):
            yield _Lexeme(one.string, kinds.tok_name[kind], line, column, indent)
        elif kind == kinds.NEWLINE:
            yield _Lexeme(EOS, "NEWLINE", line, column, indent)


def _skip(tokens: Iterator[tokenize.TokenInfo], end: int, begin: int) -> None:
    depth = 1
    while depth:
        kind = next(tokens).type
        depth += (kind == begin) - (kind == end)


def _scanned(source: str) -> Iterator[_Lexeme]:
    """What can be read of any text."""
    line, start, depth, place = 1, 0, 0, 0
    while found := LEXEMES.match(source, place):
        value, kind, column = found.group(), found.lastgroup, place - start
        place = found.end()
        if kind == "newline":
            if depth and BEGINS.match(source, place):
                depth = 0
            if not depth:
                yield _Lexeme(EOS, "NEWLINE", line, column, "")
        elif kind in ("triple", "string", "number"):
            word = NUMBER if kind == "number" else STRING
            indent = source[start : found.start()]
            yield _Lexeme(word, {"triple": "DROPPED"}.get(kind, kind.upper()), line, column, indent)
        elif kind in ("name", "op"):
            depth = max(0, depth + (value in "([{") - (value in ")]}"))
            indent = source[start : found.start()]
            yield _Lexeme(value, kind.upper(), line, column, indent)
        if "\n" in value:
            line, start = line + value.count("\n"), found.start() + value.rindex("\n") + 1


def _marked(lexemes: Iterable[_Lexeme]) -> Iterator[CodeToken]:
    """Blocks begin and end where the first token of a line stands further right or left."""
    widths, begun = [0], False
    for value, kind, line, column, indent in lexemes:
        if kind == "NEWLINE":
            if begun:
                yield CodeToken(EOS, "EOS", line, column)
            begun = False
        elif kind != "DROPPED":
            if not begun:
                width = len(indent.expandtabs())
                while width < widths[-1]:
                    widths.pop()
                    yield CodeToken(DEDENT, "DEDENT", line, column)
                if width > widths[-1]:
                    widths.append(width)
                    yield CodeToken(INDENT, "INDENT", line, column)
                begun = True
            yield CodeToken(value, kind, line, column)
