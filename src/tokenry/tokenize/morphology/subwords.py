"""Subwords for what roots and suffixes leave of a text: the strings that byte-pair encoding learns there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, trainers

from ...core.errors import InputError
from ...text.token_text import check_encodable
from .dictionary import MorphDictionary
from .pipeline import backend, byte_tokens, entries
from .scoring import look_ahead

__all__ = ["choose_roots", "learn_subwords", "word_counts"]

BATCH = 2**14  # words that are cut at once
LONGEST = 256  # characters of a stretch without spaces that are learned from; no word is as long


def word_counts(texts: Iterable[str]) -> Counter[str]:
    """How often each stretch between spaces occurs.

    Raises:
        InputError: one string in place of documents, a document that is not text, or no word at all.
    """
    if isinstance(texts, str):
        raise InputError("texts is one string; give a list of documents, for example [text]")
    counts: Counter[str] = Counter()
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"document {number} is of type {type(text).__name__}, not text; give strings, not token ids or bytes"
            )
        check_encodable(text, f"document {number}")
        counts.update(text.split(" "))
    counts.pop("", None)
    if not counts:
        raise InputError("there is no training text; give at least one document with a word in it")
    return Counter({word: count for word, count in counts.items() if len(word) <= LONGEST})


def choose_roots(
    dictionary: MorphDictionary, counts: Counter[str], most: int, rule: str = "cascade"
) -> MorphDictionary:
    """The dictionary with the roots that occur most in the text; those that occur as often in the order they had."""
    roots = [m for m in dictionary.morphemes if m.kind == "root"]
    if len(roots) <= most:
        return dictionary
    seen: Counter[str] = Counter()
    for _, count, tokens in _cut(dictionary, counts, rule):
        for kind, text in tokens:
            if kind == "root":
                seen[text] += count
    ranked = sorted(roots, key=lambda m: -sum(seen[form] for form in m.forms))  # stable
    kept = set(ranked[:most])
    return dictionary.with_morphemes(m for m in dictionary.morphemes if m.kind != "root" or m in kept)


def learn_subwords(dictionary: MorphDictionary, counts: Counter[str], room: int, rule: str = "cascade") -> list[str]:
    """At most `room` strings of two characters and more, most useful first, none of which would be dead."""
    if room < 1:
        return []
    residue: Counter[str] = Counter()
    for _, count, tokens in _cut(dictionary, counts, rule):
        stretch: list[str] = []
        for kind, text in (*tokens, ("end", "")):
            if kind in ("letter", "byte"):
                stretch.append(text)
                continue
            if len(stretch) > 1:
                residue["".join(stretch)] += count
            stretch = []
    known = {form for m in dictionary.morphemes for form in m.forms}
    above = known - set(dictionary.strings("letter"))
    learned = (_decoded(string) for string in _merged(residue, 2 * room))
    usable = (s for s in learned if s and len(s) > 1 and s not in known and not _is_dead(s, above))
    return list(dict.fromkeys(usable))[:room]


def _cut(
    dictionary: MorphDictionary, counts: Counter[str], rule: str
) -> Iterator[tuple[str, int, list[tuple[str, str]]]]:
    """(word, count, [(kind, text of the token)]); the text of letters and bytes is byte-level."""
    table = entries(dictionary, rule)
    tokenizer, words = backend(dictionary, table), list(counts)
    if rule == "score":
        look_ahead(tokenizer, {entry.token: entry.kind for entry in table.values()})
    kinds = {at: (entry.kind, entry.forms[0]) for at, entry in table.items()}
    kinds |= {at: (entry.kind, entry.token) for at, entry in table.items() if entry.kind in ("letter", "byte")}
    for begin in range(0, len(words), BATCH):
        part = words[begin : begin + BATCH]
        for word, encoding in zip(part, tokenizer.encode_batch_fast(part, add_special_tokens=False)):
            yield word, counts[word], [kinds[id] for id in encoding.ids]


def _merged(residue: Counter[str], most: int) -> list[str]:
    tokenizer = Tokenizer(models.BPE())
    alphabet = byte_tokens()
    trainer = trainers.BpeTrainer(
        vocab_size=most + len(alphabet), initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator((string for string, n in residue.items() for _ in range(n)), trainer)
    learned = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return [string for string, _ in learned if len(string) > 1]


def _decoded(string: str) -> str:
    """The text of a byte-level string, or nothing where it cuts a character."""
    text = decoders.ByteLevel().decode([string])
    return "" if "\ufffd" in text or " " in text else text


def _is_dead(string: str, above: set[str]) -> bool:
    return any(string[:n] in above for n in range(1, len(string)))
