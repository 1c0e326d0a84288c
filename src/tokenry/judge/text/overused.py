"""A list of what a model overuses, made from texts that it wrote to many prompts: entries for Antislop's `phrases`.

A word or phrase is listed where texts to several prompts have it, which what a single prompt is about does not, and
where human text has it much more rarely, see `SlopProfile`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wordfreq import word_frequency

from ...core.errors import InputError
from ...text.words import STOP_WORDS, content_words, fold, listed, words
from .slop import SlopProfile

__all__ = ["Overused", "overused"]

PROMPTS = 3  # whose texts must have an entry
RARER = 10  # times, in human text: words against the table of frequencies, phrases against the novels
KEY = 6  # times: for one word of a phrase at least, which else is an expression of today
WITHIN = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*(?: [^\W\d_]+(?:['-][^\W\d_]+)*)*")  # words with single spaces


@dataclass(frozen=True)
class Overused:
    """An entry: to how many prompts the model wrote it, and in how many texts."""

    text: str
    prompts: int
    texts: int


def overused(
    prompts: str | Sequence[str], texts: str | Sequence[str], most_words: int, most_phrases: int
) -> list[Overused]:
    """Phrases, the most common ones first, then words, the most overused first. What holds another entry is left out.

    Args:
        prompts: one for each text, again and again where there are several texts to one.

    Raises:
        InputError: no texts, or another number of prompts.
    """
    prompts, texts = listed(prompts, "prompt"), listed(texts, "text")
    if len(prompts) != len(texts):
        raise InputError(f"there are {len(prompts)} prompts and {len(texts)} texts; give the prompt of each text")
    profile = SlopProfile.fit(texts)
    single = _words(profile, prompts, texts)[:most_words]
    taken, kept = {entry.text for entry in single}, []
    for entry in _phrases(profile, prompts, texts):
        if not any(part in taken for part in _parts(entry.text)):
            taken.add(entry.text)
            kept.append(entry)
    kept.sort(key=lambda entry: (-entry.prompts, -entry.texts, entry.text))
    return [*kept[:most_phrases], *single]


def _words(profile: SlopProfile, prompts: Sequence[str], texts: Sequence[str]) -> list[Overused]:
    """The words of the profile that count, in its order."""
    asked = {word.text for prompt in prompts for word in words(prompt)}
    found = _places(prompts, texts, ([word.text for word in words(text)] for text in texts))
    ranked = [p.text for p in profile.words + profile.new_words if p.ratio >= RARER and p.text not in asked]
    return [found[text] for text in ranked if text in found and found[text].prompts >= PROMPTS]


def _phrases(profile: SlopProfile, prompts: Sequence[str], texts: Sequence[str]) -> list[Overused]:
    """The phrases of the profile that count, those of fewer words first."""
    new = {p.text for p in profile.new_bigrams + profile.new_trigrams}
    known = new | {p.text for p in profile.bigrams + profile.trigrams if p.ratio >= RARER}
    found = _places(prompts, texts, (_spans(text, known) for text in texts))
    rare = _rare_words(texts)
    counted = [e for e in found.values() if e.prompts >= PROMPTS and not rare.isdisjoint(e.text.split())]
    return sorted(counted, key=lambda e: (len(e.text.split()), -e.prompts, -e.texts, e.text))


def _places(prompts: Sequence[str], texts: Sequence[str], found: Iterable[Iterable[str]]) -> dict[str, Overused]:
    """What was found in each text, with the prompts and the texts that have it."""
    places: dict[str, set[int]] = defaultdict(set)
    for number, entries in enumerate(found):
        for entry in entries:
            places[entry].add(number)
    return {e: Overused(e, len({prompts[n] for n in numbers}), len(numbers)) for e, numbers in places.items()}


def _spans(text: str, known: set[str]) -> set[str]:
    """The folded stretches from the first to the last word of the known n-grams, inside one sentence."""
    content, found = [word for word in content_words(text) if len(word.text) >= 3], set()
    for size in (2, 3):
        for i in range(len(content) - size + 1):
            gram = content[i : i + size]
            source = fold(text[gram[0].start : gram[-1].stop])
            if " ".join(word.text for word in gram) in known and WITHIN.fullmatch(source):
                found.add(source)
    return found


def _parts(phrase: str) -> Iterable[str]:
    """The shorter runs of its words."""
    split = phrase.split()
    return (" ".join(split[i:j]) for i in range(len(split)) for j in range(i + 1, len(split) + 1) if j - i < len(split))


def _rare_words(texts: Sequence[str]) -> set[str]:
    """The words that are `KEY` times rarer in human text."""
    counts = Counter(word.text for text in texts for word in words(text))
    total = counts.total()
    return {
        word for word, n in counts.items() if word not in STOP_WORDS and n / total >= KEY * word_frequency(word, "en")
    }
