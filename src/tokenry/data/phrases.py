"""Lists of phrases that come with the package, by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from ..core.errors import InputError
from ..core.fields import shown
from ..core.method import Lines

__all__ = ["Phrases", "builtin_phrases"]

BUILTIN = "builtin:"


def builtin_phrases(name: str) -> list[str]:
    """The entries of a list; how it was made stands at its head.

    Raises:
        InputError: there is no such list.
    """
    lists = {file.name.removesuffix(".txt"): file for file in (files("tokenry.data") / "phrase_lists").iterdir()}
    if name not in lists:
        raise InputError(f"there is no list {shown(BUILTIN + name)}; the lists are {BUILTIN}{', '.join(sorted(lists))}")
    lines = lists[name].read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _named(value: Any) -> Any:
    """The name of a list stands for itself and is no file."""
    return (value,) if isinstance(value, str) and value.startswith(BUILTIN) else value


def _expanded(phrases: Sequence[str]) -> tuple[str, ...]:
    """The phrases, with those of a list where its name stands; each once."""
    found = (
        phrase
        for entry in phrases
        for phrase in (builtin_phrases(entry.removeprefix(BUILTIN)) if entry.startswith(BUILTIN) else [entry])
    )
    return tuple(dict.fromkeys(found))


Phrases = Annotated[Lines, BeforeValidator(_named), AfterValidator(_expanded)]  # or a file, or `builtin:NAME` in it
