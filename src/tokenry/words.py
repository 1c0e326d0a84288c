"""Words: case folding that keeps offsets, word spans, English stop words."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

WORD = re.compile(r"\w+(?:['’]\w+)*")

STOP_WORDS = frozenset(
    """a about above after again against all am an and any are aren't as at be because been before being below
    between both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during each few
    for from further had hadn't has hasn't have haven't having he he'd he'll he's her here here's hers herself him
    himself his how how's i i'd i'll i'm i've if in into is isn't it it's its itself just let's me more most mustn't
    my myself no nor not now of off on once only or other ought our ours ourselves out over own same shan't she she'd
    she'll she's should shouldn't so some such than that that's the their theirs them themselves then there there's
    these they they'd they'll they're they've this those through to too under until up very was wasn't we we'd we'll
    we're we've were weren't what what's when when's where where's which while who who's whom why why's will with
    won't would wouldn't you you'd you'll you're you've your yours yourself yourselves""".split()
)


def fold(text: str) -> str:
    """Lower case, character by character, so that offsets stay those of `text`."""
    lowered = text.lower()
    if len(lowered) == len(text):
        return lowered
    return "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def is_word_character(char: str) -> bool:
    """Letters, numbers and marks."""
    return unicodedata.category(char)[0] in "LNM"


def content_words(text: str, stop_words: frozenset[str] = STOP_WORDS) -> Iterator[tuple[str, int, int]]:
    """(folded word, start, stop) of every alphabetic word that is not a stop word."""
    for match in WORD.finditer(text):
        word = fold(match.group()).replace("’", "'")
        if word.isalpha() and word not in stop_words:
            yield word, match.start(), match.end()
