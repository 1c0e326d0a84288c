"""The custom tokens of KL3M: strings of markup, numbers and citations that become one token whatever BPE learns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from ...core.errors import InputError
from ...core.method import read_lines

__all__ = ["GROUPS", "custom_tokens", "read_custom_tokens"]

RUNS = range(2, 9)
TAGS = (
    "html head body div span img table thead tbody tfoot tr td ul ol li h1 h2 h3 h4 iframe script style svg input "
    "button form label select option textarea meta link title pre code row column"
).split()
ATTRIBUTES = "href src alt title class id".split()
ROMAN = "ii iii iv v vi vii viii ix".split()
LINKS = "![ http:// https:// www. ftp:// mailto: tel: ://".split()


def _runs(characters: str, lengths: Iterable[int] = RUNS) -> list[str]:
    return [character * n for character in characters for n in lengths]


def _whitespace() -> list[str]:
    return [*_runs(" \t\r\n"), "\r\n", "\t "]


def _markdown() -> list[str]:
    return [*_runs("#", range(2, 7)), "**", "~~", "```", *LINKS, *_runs(".-=_*~")]


def _html() -> list[str]:
    tags = [form for tag in TAGS for form in (f"<{tag}", f"<{tag.upper()}", f"</{tag}>")]
    return tags + [form for name in ATTRIBUTES for form in (f" {name}=", f" {name.upper()}=")]


def _json() -> list[str]:
    return '{" "} [" "] ": "," ":" null true false'.split()


def _xml() -> list[str]:
    return "<!-- --> <![CDATA[ ]]> <?xml <xml </xml>".split()


def _years() -> list[str]:
    return [str(year) for year in range(1776, 2050)]  # the range of the code; the paper says 2050


def _numbers() -> list[str]:
    return [str(number) for number in range(10, 1000)]


def _enumerations() -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    inside = [*letters, *letters.upper(), *map(str, range(1, 100)), *ROMAN, *(r.upper() for r in ROMAN)]
    return [f"({label})" for label in inside]


def _citations() -> list[str]:
    """The pieces of every key of four files of reporters-db, and of every variation of a reporter."""
    reporters = _database("reporters")
    names = [key for name in ("laws", "journals", "case_name_abbreviations") for key in _database(name)]
    variations = [v for versions in reporters.values() for version in versions for v in version["variations"]]
    return [piece for name in (*names, *reporters, *variations) for piece in name.split()]


def _database(name: str) -> dict[str, Any]:
    return json.loads((files("reporters_db") / "data" / f"{name}.json").read_text(encoding="utf-8"))


GROUPS: Mapping[str, Callable[[], list[str]]] = {
    "whitespace": _whitespace,
    "markdown": _markdown,
    "html": _html,
    "json": _json,
    "xml": _xml,
    "years": _years,
    "numbers": _numbers,
    "enumerations": _enumerations,
    "citations": _citations,
}


def custom_tokens(groups: Sequence[str] = tuple(GROUPS), lowercase: bool = False) -> list[str]:
    """The custom tokens of some groups, sorted, each once, none of a single character (arXiv 2503.17247).

    Args:
        groups: names from `GROUPS`. "citations" reads the package reporters-db, so its size follows that version.
        lowercase: the list for a tokenizer that lower-cases.

    Raises:
        InputError: an unknown group.
    """
    unknown = [group for group in groups if group not in GROUPS]
    if isinstance(groups, str) or unknown:
        raise InputError(f"groups={groups!r} is not a list of custom token groups; choose from {', '.join(GROUPS)}")
    tokens = {token.lower() if lowercase else token for group in groups for token in GROUPS[group]()}
    return sorted(token for token in tokens if len(token) > 1)


def read_custom_tokens(value: Any) -> Any:
    """Custom tokens from the command line: none, group names with commas between, a JSON list, or a file."""
    if isinstance(value, str):
        if value.strip().lower() in ("none", ""):
            return ()
        parts = [part.strip() for part in value.split(",")]
        if all(part in GROUPS for part in parts):
            return tuple(parts)
    return read_lines(value, "custom tokens")
