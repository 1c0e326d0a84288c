"""Files that come from outside, read in one place: text, entries, JSON and records.

Read, parse, check, explain: whatever is wrong with a file ends as an `InputError` that names the file, the line and the
field. Text is UTF-8, with or without a byte order mark, its lines ended by any of the usual marks.
"""

from __future__ import annotations

import json
import logging
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

from .errors import InputError

__all__ = [
    "as_text",
    "entries_of",
    "explained",
    "is_number",
    "parse_json",
    "read_entries",
    "read_json",
    "read_records",
    "read_text",
    "records_of",
    "refusing",
    "shown",
]

T = TypeVar("T")

logger = logging.getLogger(__name__)

# What reading, parsing and building from a file raises, when the file is to blame.
BROKEN = (
    *(OSError, EOFError, zlib.error),
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError),
)
UTF16 = (b"\xff\xfe", b"\xfe\xff")
JSON_BEGINS = re.compile(r'\s*(\[(\s*["\]]|[^\S\n]*(\n|$))|\{\s*")')  # `[Tt]he` is a regular expression


# --- the guard -----------------------------------------------------------------------------------------------------


@contextmanager
def refusing(sentence: Callable[[Exception], str], *further: type[Exception]) -> Iterator[None]:
    """Refuse with a sentence whatever a broken file makes the code inside raise.

    Inside stand only calls that read files and build what they describe, so that an error there is the files'.

    Args:
        sentence: makes it of the error.
        further: what a library of the code inside raises beside the usual.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        precise = type(error) is not Exception  # the library tokenizers raises nothing else
        if precise and not isinstance(error, (*BROKEN, *further)):
            raise
        raise InputError(sentence(error)) from error


def explained(problem: str, remedy: str, *further: type[Exception]) -> AbstractContextManager[None]:
    """Refuse with "problem (reason); remedy", see `refusing`."""
    return refusing(lambda error: f"{problem} ({reason(error)}); {remedy}", *further)


def reason(error: Exception) -> str:
    """What went wrong, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 text: byte {error.object[error.start]:#04x} at {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole or (isinstance(value, float) and math.isfinite(value))


def shown(value: Any) -> str:
    """A JSON value in a few characters."""
    if isinstance(value, list | tuple | dict):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 40 else text[:36] + " ..."


# --- text ----------------------------------------------------------------------------------------------------------


def as_text(data: bytes) -> str:
    """UTF-8 as text, without its byte order mark and with lines that end in a line feed.

    Raises:
        ValueError: another encoding, or no text at all.
    """
    if data[:2] in UTF16:
        raise ValueError("UTF-16, not UTF-8 text")
    if b"\0" in data:
        raise ValueError("not UTF-8 text: it holds a NUL byte")
    return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: str | Path, what: str, remedy: str = "give a text file") -> str:
    """The text of a file, see `as_text`.

    Args:
        what: the file's name in refusals; `remedy`: how they end.
    """
    with explained(f"the {what} {str(path)!r} cannot be read", remedy):
        return as_text(Path(path).read_bytes())


def entries_of(text: str) -> list[str]:
    """The entries of a text: one a line, without the blanks around it, or a JSON list of texts, taken as it stands.

    Raises:
        ValueError: JSON that is broken, or no list of texts.
    """
    found = _json_entries(text) if text.lstrip()[:1] in ("[", "{") else None
    return [line.strip() for line in text.removesuffix("\n").split("\n")] if found is None else found


def _json_entries(text: str) -> list[str] | None:
    try:
        found = parse_json(text)
    except ValueError as error:
        if JSON_BEGINS.match(text) or not isinstance(error, json.JSONDecodeError):
            raise ValueError(f"it begins as JSON and is no JSON list of texts: {error}") from None
        return None
    if not isinstance(found, list):
        raise ValueError("it is a JSON object, not a list of texts")
    for number, entry in enumerate(found, 1):
        if not isinstance(entry, str):
            raise ValueError(f"entry {number} of the JSON list is {shown(entry)}, not a text")
    return found


def read_entries(path: str | Path, what: str, remedy: str = "give a text file with one entry per line") -> list[str]:
    """The different entries of a file, see `entries_of`; blank ones are left out. Says on the log what it took.

    Args:
        what: the entries' name in refusals and on the log, in the plural.
    """
    with explained(f"the file {str(path)!r} cannot be read", remedy):
        found = [entry for entry in entries_of(as_text(Path(path).read_bytes())) if entry.strip()]
    if not found:
        raise InputError(f"the file {str(path)!r} holds no {what}; {remedy}")
    different = list(dict.fromkeys(found))
    twice = len(found) - len(different)
    logger.info(f"{path}: {len(different):,} {what}, {twice:,} duplicates")
    return different


# --- JSON ----------------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: no JSON, an absurd number, brackets nested too deeply, or half a character in a text.
    """
    try:
        value = json.loads(text)
        if "\\u" in text:  # the one way to write half of a surrogate pair, which nothing can encode
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"it holds half a character, {error.object[error.start]!a}") from None
    return value


def read_json(path: str | Path) -> Any:
    """The value in a JSON file; call it inside `explained`."""
    return parse_json(as_text(Path(path).read_bytes()))


def read_records(path: str | Path, what: str, remedy: str, check: Callable[[dict[str, Any], str], T]) -> list[T]:
    """What `check` makes of the JSON objects of a file, one a line; at least one, see `records_of`."""
    return records_of(read_text(path, what, remedy), str(path), what, remedy, check)


def records_of(text: str, name: str, what: str, remedy: str, check: Callable[[dict[str, Any], str], T]) -> list[T]:
    """What `check` makes of the JSON objects of a text, one a line; blank lines do not count.

    Args:
        name: of the file, in refusals; `what`: the records' name there, in the plural; `remedy`: how they end.
        check: takes an object and how a refusal of it begins, such as "line 3 of 'pairs.jsonl'".

    Raises:
        InputError: a line that is no object or that `check` refuses, or no line at all.
    """
    lines = enumerate(text.split("\n"), 1)  # only a line feed ends one: JSON texts may hold other marks of Unicode
    rows = {where: _object(line, where, remedy) for where, line in _named(lines, name)}
    if not rows:
        raise InputError(f"{name!r} holds no {what}; {remedy}")
    return [check(row, where) for where, row in rows.items()]


def _named(lines: Iterable[tuple[int, str]], name: str) -> Iterator[tuple[str, str]]:
    return ((f"line {number} of {name!r}", line) for number, line in lines if line.strip())


def _object(line: str, where: str, remedy: str) -> dict[str, Any]:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); {remedy}") from None
    if not isinstance(row, dict):
        raise InputError(f"{where} is not an object, it is {shown(row)}; {remedy}")
    return row
