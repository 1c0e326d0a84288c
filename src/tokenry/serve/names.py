"""The names that clients of other servers send, as `names.json` lists them, and what they mean here."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..core.fields import is_unicode, shown
from ..core.files import parse_json, read_text
from .errors import Refused

__all__ = ["ALIASES", "IGNORED", "RENAMED", "canonical", "method_entries", "unknown"]

_NAMES: dict[str, Any] = parse_json(read_text(Path(__file__).with_name("names.json"), "names"))
RENAMED: dict[str, str] = _NAMES["renamed"]  # other names of an option
ALIASES: dict[str, dict[str, Any]] = _NAMES["methods"]  # options of methods, at the top of a request
BY_ELEMENT: dict[str, dict[str, str]] = _NAMES["by_element"]  # lists whose elements say what they are
NEUTRAL: dict[str, list[Any]] = _NAMES["neutral"]  # what is not done here, and the values that ask for nothing
IGNORED: frozenset[str] = frozenset(_NAMES["ignored"])  # what does not bear on the text, or only beside one of those
PLAIN = re.compile(r"[\w.-]{1,40}", re.ASCII)
SHOWN = 20  # names in a header
CLOSE = 0.8  # of difflib: likeness from which a name is taken for a slip


def canonical(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request under the names that it has here; null is as if the field were left out.

    Raises:
        Refused: two names of one option with different values, something that is not done here, or what is no text.
    """
    if not is_unicode(json.dumps(values, ensure_ascii=False)):
        raise Refused("the request has half a surrogate pair, which is no text; take it out")
    out: dict[str, Any] = {}
    for given, value in values.items():
        for name, part in _split(RENAMED.get(given, given), value):
            if part is None:
                continue
            if name in NEUTRAL:
                _check_neutral(name, part)
                continue
            if name in out and out[name] != part:
                raise Refused(
                    f"{given}={shown(part)} and {name}={shown(out[name])} contradict; give one of them", given
                )
            out[name] = part
    return out


def _split(name: str, value: Any) -> list[tuple[str, Any]]:
    """A list of texts and ids under the names of what they are; anything else as it is."""
    if name not in BY_ELEMENT or not isinstance(value, list):
        return [(BY_ELEMENT[name]["number"] if name in BY_ELEMENT else name, value)]
    texts = [part for part in value if isinstance(part, str)]
    rest = [part for part in value if not isinstance(part, str)]
    parts = ((BY_ELEMENT[name]["text"], texts), (BY_ELEMENT[name]["number"], rest))
    return [(target, part) for target, part in parts if part]


def _check_neutral(name: str, value: Any) -> None:
    allowed = NEUTRAL[name]
    if value not in allowed and value not in ("", [], {}, False):
        remedy = "leave it out" + (f", or give {allowed[0]}" if allowed else "")
        raise Refused(f"{name}={shown(value)} is not done here; {remedy}", name)


def method_entries(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of `methods` that options of methods at the top of a request stand for.

    Args:
        values: {name in `ALIASES`: value}, those that were given.
    """
    entries: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        alias = ALIASES[name]
        entry = entries.setdefault(alias["method"], {"name": alias["method"], **alias.get("beside", {})})
        entry |= alias.get("beside", {})
        if alias["type"] == "texts":
            texts = [value] if isinstance(value, str) else value
            entry[alias["option"]] = [
                *entry.get(alias["option"], []),
                *(alias.get("form", "{}").format(t) for t in texts),
            ]
        else:
            entry[alias["option"]] = min(value / alias["divide"], alias["most"])
    return list(entries.values())


def unknown(extras: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The names of a request that mean nothing here, and that the answer says are ignored.

    Args:
        known: the fields of the request.

    Raises:
        Refused: a name looks like a slip of the pen.
    """
    names = [*known, *RENAMED, *ALIASES, *BY_ELEMENT, *NEUTRAL]
    found = [name for name in extras if name not in IGNORED]
    for name in found:
        close = difflib.get_close_matches(name[:60], names, 1, CLOSE)
        if close:
            raise Refused(f"there is no field {shown(name)}; did you mean {close[0]!r}?", name[:60])
    return [name if PLAIN.fullmatch(name) else "?" for name in found[:SHOWN]]
