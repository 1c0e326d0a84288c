"""A generated language pair: lexicon, agreement and order are known, so that every error of a translation is, too.

The source is written like English with invented words, the target puts the verb last and what belongs to a noun behind
it:

    the pasune tiki the muro near a seta   ->   <pasune> ul <muro> ula <near> <seta> una <tiki>

Articles agree with the gender of their noun, verbs with the number of their subject. Some words have two translations,
and an adverb has two places: both are right. Words are drawn by Zipf's law, so that rare ones are hard to learn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Literal, NamedTuple

from ..core.errors import InputError
from ..core.hashes import digest
from .problems import Split, split_of

__all__ = ["Errors", "Sentence", "draw_sentences", "errors_of", "lexicon", "parse", "vocabulary"]

NOUNS, VERBS, ADJECTIVES = 240, 80, 50
ARTICLES = ("the", "a", "these")  # the last one is of the plural
PREPOSITIONS, ADVERBS = ("with", "near", "under", "from"), ("often", "never", "today", "slowly")
FORMS = {  # of an article, for the two genders
    "the": ("ul", "ula"),
    "a": ("un", "una"),
    "these": ("isti", "iste"),
}
SMALL = {
    **{"with": ("ze",), "near": ("gar",), "under": ("dol",), "from": ("bre",)},
    **{"often": ("ledge",), "never": ("vrul",), "today": ("zalm",), "slowly": ("grade",)},
}
SYNONYMS = 3  # one of so many nouns and verbs has two translations
MINOR, MAJOR = 0.1, 1.0  # weights of errors, see `errors_of`
Kind = Literal["noun", "verb", "adjective", "article", "preposition", "adverb"]


class Word(NamedTuple):
    """A source word: what it can become, and the gender of nouns. A verb has its singular forms, then the plural's."""

    kind: Kind
    targets: tuple[str, ...]
    gender: int = 0


class Slot(NamedTuple):
    """A word of a translation: all that are right there, and those that are another form of the right word."""

    right: frozenset[str]
    forms: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Sentence:
    """A source sentence with one of its translations and, in `orders`, all: each order as one slot a word."""

    source: str
    target: str
    orders: tuple[tuple[Slot, ...], ...]


class Errors(NamedTuple):
    """What is wrong with a translation.

    Attributes:
        wrong: whether each of its words is.
        score: 1 - the errors' weights / the number of words: 0.1 for another form of the right word, 1 for any other
            word, one too many or one that is missing.
    """

    wrong: list[bool]
    score: float


@cache
def lexicon() -> dict[str, Word]:
    """Every source word, the frequent ones of a kind first."""
    rng = random.Random("lexicon")
    sources, targets = _invented("ptkmns", "aeiou", rng), _invented("bdglrvz", "aeou", rng)
    words: dict[str, Word] = {}
    counts: dict[Kind, int] = {"noun": NOUNS, "verb": VERBS, "adjective": ADJECTIVES}
    for kind, count in counts.items():
        for i in range(count):
            twice = kind != "adjective" and i % SYNONYMS == 0
            stems = [next(targets) for _ in range(1 + twice)]
            forms = [*stems, *(stem + "ti" for stem in stems)] if kind == "verb" else stems
            words[next(sources)] = Word(kind, tuple(forms), i % 2)
    words |= {word: Word("article", FORMS[word]) for word in ARTICLES}
    words |= {word: Word("preposition", SMALL[word]) for word in PREPOSITIONS}
    return words | {word: Word("adverb", SMALL[word]) for word in ADVERBS}


def _invented(consonants: str, vowels: str, rng: random.Random) -> Iterator[str]:
    """Endless different words of two or three syllables."""
    seen: set[str] = set()
    while True:
        word = "".join(rng.choice(consonants) + rng.choice(vowels) for _ in range(rng.choice((2, 2, 3))))
        if word not in seen:
            seen.add(word)
            yield word


@cache
def vocabulary() -> tuple[str, ...]:
    """All words of both languages."""
    words = lexicon()
    return tuple(dict.fromkeys([*words, *(target for word in words.values() for target in word.targets)]))


@cache
def _of(kind: Kind) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The words of a kind, and how often they come."""
    words = tuple(word for word, entry in lexicon().items() if entry.kind == kind)
    return words, tuple(1 / (rank + 5) for rank in range(len(words)))


def _draw(kind: Kind, rng: random.Random) -> str:
    words, weights = _of(kind)
    return rng.choices(words, weights)[0]


# --- sentences -----------------------------------------------------------------------------------------------------


def draw_sentences(count: int, split: Split, third: int | None = None, seed: int = 0) -> list[Sentence]:
    """Different sentences of one split, or of one of three parts of it; a longer list begins with the shorter one."""
    rng, found = random.Random(f"sentence {split} {seed}"), {}
    while len(found) < count:
        sentence = _sentence(rng)
        mine = third is None or int(digest(sentence.source), 16) % 3 == third
        if mine and split_of(sentence.source) == split:
            found.setdefault(sentence.source, sentence)
    return list(found.values())


def _sentence(rng: random.Random) -> Sentence:
    subject, thing = _phrase(rng), _phrase(rng)
    verb, place = _draw("verb", rng), rng.random() < 1 / 2
    preposition, where = (_draw("preposition", rng), _phrase(rng)) if place else ("", [])
    adverb = _draw("adverb", rng) if rng.random() < 1 / 2 else ""
    source = [adverb, *subject, verb, *thing, preposition, *where]
    body = [*_turned(subject), *_turned(thing), *([_slot(preposition)] if place else []), *_turned(where)]
    last = _verb(verb, plural=subject[0] == ARTICLES[2])
    orders = [(*body, last)]
    if adverb:
        orders = [(_slot(adverb), *body, last), (*body, _slot(adverb), last)]
    target = " ".join(rng.choice(sorted(slot.right)) for slot in rng.choice(orders))
    return Sentence(" ".join(word for word in source if word), target, tuple(orders))


def _phrase(rng: random.Random) -> list[str]:
    """Article, perhaps an adjective, noun."""
    adjective = [_draw("adjective", rng)] if rng.random() < 1 / 3 else []
    return [_draw("article", rng), *adjective, _draw("noun", rng)]


def _turned(phrase: Sequence[str]) -> list[Slot]:
    """A phrase in the target: noun, adjective, article."""
    if not phrase:
        return []
    forms, gender = FORMS[phrase[0]], lexicon()[phrase[-1]].gender
    article = Slot(frozenset([forms[gender]]), frozenset([forms[1 - gender]]))
    return [*(_slot(word) for word in reversed(phrase[1:])), article]


def _slot(word: str) -> Slot:
    return Slot(frozenset(lexicon()[word].targets))


def _verb(word: str, plural: bool) -> Slot:
    forms = lexicon()[word].targets
    half = len(forms) // 2
    return Slot(
        frozenset(forms[half:] if plural else forms[:half]), frozenset(forms[:half] if plural else forms[half:])
    )


# --- errors --------------------------------------------------------------------------------------------------------


def errors_of(sentence: Sentence, translation: Sequence[str]) -> Errors:
    """The errors of the words of a translation, by the cheapest way to one that is right.

    Raises:
        InputError: one text instead of words.
    """
    _check_words(translation)
    return max((_errors(order, translation) for order in sentence.orders), key=lambda found: found.score)


def _errors(slots: Sequence[Slot], words: Sequence[str]) -> Errors:
    """By the edits that cost least, which a table (words, slots) holds."""
    cost = {(i, j): MAJOR * max(i, j) for i in range(len(words) + 1) for j in range(len(slots) + 1) if not i * j}
    for i, j in product(range(1, len(words) + 1), range(1, len(slots) + 1)):
        cost[i, j] = min(
            cost[i - 1, j - 1] + _weight(words[i - 1], slots[j - 1]), cost[i - 1, j] + MAJOR, cost[i, j - 1] + MAJOR
        )
    i, j, wrong = len(words), len(slots), [True] * len(words)
    while i and j:
        weight = _weight(words[i - 1], slots[j - 1])
        if cost[i, j] == cost[i - 1, j - 1] + weight:
            i, j = i - 1, j - 1
            wrong[i] = weight > 0
        elif cost[i, j] == cost[i - 1, j] + MAJOR:
            i -= 1
        else:
            j -= 1
    return Errors(wrong, 1 - cost[len(words), len(slots)] / max(1, len(words)))


def _weight(word: str, slot: Slot) -> float:
    return 0.0 if word in slot.right else MINOR if word in slot.forms else MAJOR


# --- trees ---------------------------------------------------------------------------------------------------------


@cache
def _kinds() -> dict[str, Kind]:
    """What each target word is."""
    return {target: word.kind for word in lexicon().values() for target in word.targets}


def parse(words: Sequence[str]) -> list[int]:
    """The dependency tree of a target sentence, right or not: each word's head, counted from 1, and 0 for the root.

    The first verb (without one: the first word) is the root; articles and adjectives hang on the noun before them,
    prepositions on the noun behind them, and all else on the root.

    Raises:
        InputError: one text instead of words.
    """
    _check_words(words)
    kinds = [_kinds().get(word) for word in words]
    root = kinds.index("verb") if "verb" in kinds else 0
    nouns = [i for i, kind in enumerate(kinds) if kind == "noun"]
    heads = []
    for i, kind in enumerate(kinds):
        near = {
            "article": max((n for n in nouns if n < i), default=root),
            "adjective": max((n for n in nouns if n < i), default=root),
            "preposition": min((n for n in nouns if n > i), default=root),
        }.get(kind or "", root)
        heads.append(0 if i == root else near + 1)
    return heads


def _check_words(words: Sequence[str]) -> None:
    if isinstance(words, str):
        raise InputError(f"the translation is one text, {words[:40]!r}; give a list of words, such as text.split()")
