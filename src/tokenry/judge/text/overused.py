"""A list of what a model overuses, made from texts that it wrote to many prompts: entries for Antislop's `phrases`.

A word or phrase is listed where texts to several prompts have it, which what a single prompt is about does not, and
where human text has it much more rarely, see `SlopProfile`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from wordfreq import word_frequency

from ...text.words import STOP_WORDS, content_words, fold, words
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


def overused(prompts: Sequence[str], texts: Sequence[str], most_words: int, most_phrases: int) -> list[Overused]:
    """Phrases, then words, each by how many prompts have them in their texts. What holds another entry is left out.

    Args:
        prompts: one for each text, again and again where there are several texts to one.
    """
    profile = SlopProfile.fit(texts)
    asked = {word.text for prompt in prompts for word in words(prompt)}
    found = _places(prompts, texts, ([w.text for w in words(text)] for text in texts))
    ranked = [p.text for p in profile.words + profile.new_words if p.ratio >= RARER and p.text not in asked]
    single = [entry for text in ranked if (entry := found.get(text)) and entry.prompts >= PROMPTS][:most_words]
    grams = (profile.bigrams, profile.new_bigrams, profile.trigrams, profile.new_trigrams)
    known = {p.text for group in grams for p in group if p.ratio >= RARER or group in (grams[1], grams[3])}
    spans = _places(prompts, texts, (_spans(text, known) for text in texts))
    rare = _rarer(texts)
    phrases = [s for s in spans.values() if s.prompts >= PROMPTS and any(rare(word) for word in s.text.split())]
    taken = {entry.text for entry in single}
    kept: list[Overused] = []
    for entry in sorted(phrases, key=lambda e: (len(e.text.split()), -e.prompts, -e.texts, e.text)):
        if not any(part in taken for part in _parts(entry.text)):
            taken.add(entry.text)
            kept.append(entry)
    order = sorted(kept, key=lambda e: (-e.prompts, -e.texts, e.text))[:most_phrases]
    return [*order, *single]


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


def _rarer(texts: Sequence[str]):
    """Whether a word is much rarer in human text."""
    counts: dict[str, int] = defaultdict(int)
    for text in texts:
        for word in words(text):
            counts[word.text] += 1
    total = sum(counts.values())
    return lambda word: word not in STOP_WORDS and counts[word] / total >= KEY * word_frequency(word, "en")
