"""What is a word, a morpheme and a root of a language: sets, or the Turkish analyser zeyrek."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol

from ...core.errors import InputError
from ...core.fields import shown
from ...core.files import explained, read_json
from ..morphology.dictionary import MorphDictionary

__all__ = ["Lexicon", "SetLexicon", "ZeyrekLexicon", "load_lexicon"]


class Lexicon(Protocol):
    """Answers for a string in lower case without blanks around it."""

    def fold(self, text: str, /) -> str:
        """Lower case, as the language has it."""
        ...

    def is_word(self, text: str) -> bool: ...

    def is_morpheme(self, text: str) -> bool:
        """Whether it is one of the closed class of suffixes, in any of its forms."""
        ...

    def is_root(self, text: str) -> bool:
        """Whether it is a word of a stem alone."""
        ...

    def root(self, text: str) -> str | None:
        """The root of its first analysis."""
        ...


class SetLexicon:
    """A lexicon of three sets; roots are words, too.

    Raises:
        InputError: no entry at all, or one string in place of several.
    """

    def __init__(
        self,
        words: Iterable[str] = (),
        morphemes: Iterable[str] = (),
        roots: Iterable[str] = (),
        fold: Callable[[str], str] = str.lower,
    ) -> None:
        for name, given in (("words", words), ("morphemes", morphemes), ("roots", roots)):
            if isinstance(given, str):
                raise InputError(f"{name}={shown(given)} is one string; give a list, for example [{given[:20]!r}]")
        self.fold = fold
        self.roots, self.morphemes = ({fold(entry) for entry in given} for given in (roots, morphemes))
        self.words = {fold(word) for word in words} | self.roots
        if not self.words | self.morphemes:
            raise InputError("the lexicon has no entry; give words, morphemes or roots")

    def is_word(self, text: str) -> bool:
        return text in self.words

    def is_morpheme(self, text: str) -> bool:
        return text in self.morphemes

    def is_root(self, text: str) -> bool:
        return text in self.roots

    def root(self, text: str) -> str | None:
        return text if text in self.roots else None


class ZeyrekLexicon:
    """Turkish, by the analyser of the package zeyrek (MIT); names and abbreviations are no words.

    Its grammar is its own, but its roots are those of Zemberek, as are those of the morphological tokenizer.
    """

    def __init__(self) -> None:
        self._analyse = _analyser()
        turkish = MorphDictionary.load("turkish")
        self._case = str.maketrans(dict(turkish.case))
        self._suffixes = {*turkish.strings("suffix"), *turkish.strings("letter")}
        self._parses = lru_cache(2**17)(self._parsed)

    def fold(self, text: str) -> str:
        return text.translate(self._case)

    def is_word(self, text: str) -> bool:
        return bool(self._parses(text))

    def is_morpheme(self, text: str) -> bool:
        return text in self._suffixes

    def is_root(self, text: str) -> bool:
        return any(parts == (text,) for parts in self._parses(text))

    def root(self, text: str) -> str | None:
        return next((parts[0] for parts in self._parses(text)), None)

    def _parsed(self, text: str) -> tuple[tuple[str, ...], ...]:
        """The surface parts of each analysis; none for what is no word."""
        if not text.isalpha():
            return ()
        found = (item for item in self._analyse(text) if not item.dict_item.id_.endswith(("_Prop", "_Abbrv")))
        return tuple(tuple(surface for _, surface in item.morphemes if surface) for item in found)


@cache
def _analyser() -> Callable[[str], list[Any]]:
    try:
        from zeyrek import MorphAnalyzer
    except ImportError:
        raise InputError("the analyser zeyrek is not installed; run `pip install zeyrek`") from None
    logging.getLogger("zeyrek.rulebasedanalyzer").setLevel(logging.ERROR)  # it warns of every analysis
    return MorphAnalyzer()._parse


def load_lexicon(name: str | Path) -> Lexicon:
    """ "zeyrek" for Turkish, or a JSON file {"words": [...], "morphemes": [...], "roots": [...]}.

    Raises:
        InputError: no such file, another one, or one without an entry.
    """
    if name == "zeyrek":
        return ZeyrekLexicon()
    with explained(
        f"the lexicon {shown(str(name))} cannot be read", "give zeyrek, or a JSON file with words, morphemes, roots"
    ):
        parts = read_json(name)
        known = {"words", "morphemes", "roots"}
        if not isinstance(parts, dict) or not set(parts) <= known or not all(_is_list(part) for part in parts.values()):
            raise ValueError(f"no object of lists named {', '.join(sorted(known))}: {json.dumps(parts)[:40]}")
        return SetLexicon(**parts)


def _is_list(part: Any) -> bool:
    return isinstance(part, list) and all(isinstance(entry, str) for entry in part)
