"""The dictionary of a language: its case, its roots, suffixes and subwords, and which form stands where."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ...core.errors import InputError
from ...core.fields import is_unicode, shown
from ...core.files import as_text, explained, parse_json

__all__ = ["LANGUAGES", "MorphDictionary", "Morpheme", "letters_of"]

LANGUAGES = {"turkish": "turkish.json.gz", "english": "english.json"}
TABLES = ("root", "suffix", "subword", "letter")  # the order of priority; letters are too short to shadow anything
PLURAL = {"root": "roots", "suffix": "suffixes", "subword": "subwords", "letter": "letters"}
REMEDY = "see docs/methods/morphological.md for the format"


@dataclass(frozen=True)
class Morpheme:
    """Forms of one morpheme, which share an id; the first one is the form that stands for all.

    Attributes:
        kind: root, suffix, subword or letter; or mark, to fix the id of one.
        rule: says where each of several forms stands; without one it is always the first.
        id: fixed from outside, or None for the next free one.
    """

    kind: str
    forms: tuple[str, ...]
    rule: str = ""
    id: int | None = None


@dataclass(frozen=True)
class MorphDictionary:
    """What a tokenizer knows of a language.

    MorphDictionary.load("turkish"); MorphDictionary.of(roots=["walk"], suffixes=["ed"], case={"W": "w"})

    Attributes:
        case: {upper-case letter: lower-case letter}, one to one; other letters stay as they are.
        contexts: {name: {"after": regular expression over the letters before a form, "stems": [words that count as if
            it matched], "before": regular expression over the piece behind it}}; one of them is enough.
        rules: {name: for each form the contexts that it asks for}.

    Raises:
        InputError: no entry, one string in two places, an id twice, a root that no text can hold (an upper-case letter,
            a space), a rule or context that does not exist or does not fit, or case that is not one to one.
    """

    language: str
    case: Mapping[str, str]
    morphemes: tuple[Morpheme, ...]
    contexts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rules: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.morphemes:
            raise InputError(f"the dictionary of {self.language} is empty; give at least one root, suffix or subword")
        _check_case(self.case, self.language)
        _check_contexts(self.contexts)
        for name, forms in self.rules.items():
            unknown = {context for form in forms for context in form} - set(self.contexts)
            if unknown:
                raise InputError(f"rule {name!r} asks for the context {min(unknown)!r}, which is not among contexts")
        _check_ids(self.morphemes)
        seen: dict[str, str] = {}
        for morpheme in self.morphemes:
            self._check(morpheme, seen)

    def _check(self, morpheme: Morpheme, seen: dict[str, str]) -> None:
        for form in morpheme.forms if morpheme.kind != "mark" else ():
            where = f"the {morpheme.kind} {shown(form)}"
            if not form or " " in form or not is_unicode(form):
                raise InputError(f"{where} is empty, holds a space or is no text, so nothing can match it; take it out")
            if upper := next((c for c in form if c in self.case), ""):
                raise InputError(
                    f"{where} has the upper-case letter {upper!r}; text is matched in lower case, write it so"
                )
            if morpheme.kind == "letter" and len(form) > 1:
                raise InputError(f"{where} is longer than a letter; put it among suffixes or subwords")
            if form in seen:
                raise InputError(f"the string {shown(form)} is a {seen[form]} and a {morpheme.kind}; keep it once")
            seen[form] = morpheme.kind
        if len(morpheme.forms) > 1 and morpheme.rule and len(self.rules.get(morpheme.rule, ())) != len(morpheme.forms):
            known = f"has {len(self.rules[morpheme.rule])}" if morpheme.rule in self.rules else "is not among rules"
            raise InputError(
                f"the {morpheme.kind} {shown(morpheme.forms[0])} has {len(morpheme.forms)} forms and its rule "
                f"{morpheme.rule!r} {known}; give one list of contexts for each form"
            )

    @classmethod
    def of(
        cls,
        roots: Iterable[Any] = (),
        suffixes: Iterable[Any] = (),
        subwords: Iterable[Any] = (),
        letters: Iterable[Any] = (),
        **parts: Any,
    ) -> MorphDictionary:
        """A dictionary from lists: a string is a morpheme of one form, [rule, form, form, ...] one of several."""
        tables = zip(TABLES, (roots, suffixes, subwords, letters))
        morphemes = tuple(_morpheme(kind, row) for kind, rows in tables for row in rows)
        return cls(language=parts.pop("language", "this language"), morphemes=morphemes, **parts)

    @classmethod
    def load(cls, name: str | Path) -> MorphDictionary:
        """ "turkish", "english", or a JSON file (also .json.gz) with case, roots, suffixes and what belongs to them."""
        inside = LANGUAGES.get(str(name))
        path = files("tokenry.tokenize.morphology") / inside if inside else Path(name)
        with explained(f"the dictionary {shown(str(name))} cannot be read", "give turkish, english or a JSON file"):
            data = path.read_bytes()
            value = parse_json(as_text(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data))
        return cls.from_json(value, str(name))

    @classmethod
    def from_json(cls, value: Any, name: str = "the dictionary") -> MorphDictionary:
        """A dictionary from the JSON object that files hold."""
        if not isinstance(value, dict) or not isinstance(value.get("case"), dict):
            raise InputError(
                f"{name} is no object with a 'case'; give one, or {{}} for a script without case; {REMEDY}"
            )
        tables = {PLURAL[kind]: value.get(PLURAL[kind], []) for kind in TABLES}
        for table, rows in tables.items():
            if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
                raise InputError(f"{name}: {table} is no list of strings and of [rule, form, form, ...]; {REMEDY}")
        rules, contexts = value.get("rules", {}), value.get("contexts", {})
        if not _is_rules(rules) or not _is_contexts(contexts):
            raise InputError(f"{name}: rules or contexts are not as they should be; {REMEDY}")
        language = str(value.get("language", "this language"))
        return cls.of(**tables, language=language, case=value["case"], rules=rules, contexts=contexts)

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `from_json` reads. Ids are not in it."""
        rows: dict[str, list[Any]] = {PLURAL[kind]: [] for kind in TABLES}
        for m in self.morphemes:
            if m.kind == "mark":
                continue
            rows[PLURAL[m.kind]].append(m.forms[0] if len(m.forms) == 1 else [m.rule, *m.forms])
        return {
            "language": self.language,
            "case": dict(self.case),
            "contexts": {name: dict(context) for name, context in self.contexts.items()},
            "rules": {name: [list(form) for form in forms] for name, forms in self.rules.items()},
            **rows,
        }

    def save(self, path: str | Path) -> None:
        """Write it as JSON, which `load` reads."""
        Path(path).write_text(json.dumps(self.to_json(), ensure_ascii=False), encoding="utf-8")

    def strings(self, kind: str) -> list[str]:
        """All forms of a kind."""
        return [form for m in self.morphemes if m.kind == kind for form in m.forms]

    def dead(self) -> dict[str, str]:
        """{string that no text is ever cut into: the string of a higher table that is its beginning}.

        At every place roots come before suffixes and these before subwords, so that a suffix which begins with a root
        is never reached. Without them, the longest match over all strings is the cascade of tables.
        """
        found: dict[str, str] = {}
        above: set[str] = set()
        for kind in TABLES[:3]:
            strings = self.strings(kind)
            for string in strings:
                hidden = next((string[:n] for n in range(1, len(string)) if string[:n] in above), None)
                if hidden is not None:
                    found[string] = hidden
            above.update(strings)
        return found

    def with_morphemes(self, morphemes: Iterable[Morpheme]) -> MorphDictionary:
        """The same language with other entries."""
        return replace(self, morphemes=tuple(morphemes))


def letters_of(dictionary: MorphDictionary) -> list[str]:
    """Lower-case letters of the case table that are no entry yet: each must be one token, or no mark could raise it."""
    known = {form for morpheme in dictionary.morphemes for form in morpheme.forms}
    return [letter for letter in dict.fromkeys(dictionary.case.values()) if letter not in known]


def _morpheme(kind: str, row: Any) -> Morpheme:
    if isinstance(row, Morpheme):
        return row
    if isinstance(row, str):
        return Morpheme(kind, (row,))
    rule, *forms = row
    return Morpheme(kind, tuple(forms), rule)


def _is_row(row: Any) -> bool:
    listed = isinstance(row, list) and len(row) > 2 and all(isinstance(form, str) for form in row)
    return isinstance(row, str) or listed


def _is_rules(rules: Any) -> bool:
    return isinstance(rules, dict) and all(
        isinstance(forms, list)
        and all(isinstance(form, list) and all(isinstance(name, str) for name in form) for form in forms)
        for forms in rules.values()
    )


def _is_contexts(contexts: Any) -> bool:
    return isinstance(contexts, dict) and all(
        isinstance(sides, dict) and all(_is_side(name, side) for name, side in sides.items())
        for sides in contexts.values()
    )


def _is_side(name: str, side: Any) -> bool:
    listed = isinstance(side, list) and all(isinstance(stem, str) for stem in side)
    return listed if name == "stems" else isinstance(side, str)


def _check_case(case: Mapping[str, str], language: str) -> None:
    letters = [*case, *case.values()]
    single = all(isinstance(c, str) and len(c) == 1 and not c.isspace() and is_unicode(c) for c in letters)
    if not single or len(set(letters)) != len(letters):
        raise InputError(
            f"the case of {language} is not one to one; give single letters, {{upper: lower}}, each of them once"
        )


def _check_contexts(contexts: Mapping[str, Mapping[str, Any]]) -> None:
    for name, sides in contexts.items():
        if not set(sides) <= {"after", "before", "stems"} or not sides:
            raise InputError(f"context {name!r} has {', '.join(sides) or 'nothing'}; give 'after', 'stems' or 'before'")
        for pattern in (side for name, side in sides.items() if name != "stems"):
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"context {name!r} is no regular expression ({error}); mend it") from None


def _check_ids(morphemes: Iterable[Morpheme]) -> None:
    taken: dict[int, str] = {}
    for morpheme in morphemes:
        if morpheme.id is None:
            continue
        if morpheme.id in taken:
            raise InputError(
                f"the id {morpheme.id} is that of {shown(taken[morpheme.id])} and of {shown(morpheme.forms[0])}; "
                "give each its own"
            )
        taken[morpheme.id] = morpheme.forms[0]
