"""A dictionary as a pipeline of the library tokenizers: bytes, marks for case, and one longest match.

Every string stands for its own id here; which of them share one is the business of the tokenizer around it. The cascade
of tables (the longest root, else the longest suffix, else the longest subword) is one longest match over all strings
but the dead ones, see `MorphDictionary.dead`: if a suffix and a root both begin the rest of a word, either the root
begins the suffix, which is dead then, or the root is longer. UTF-8 synchronizes itself, so this holds over bytes, too.
"""

from __future__ import annotations

from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .dictionary import MorphDictionary, letters_of

__all__ = ["EOS", "MARK", "PAD", "SPACE", "Entry", "backend", "entries", "to_bytes"]

# Marks stand outside the 256 characters of the byte alphabet, so that no text can hold them.
MARK = "⇧"  # the next letter is upper-case
JOINED = "│"  # between forms that share an id, and before a string that is never matched
PAD, EOS, SPACE = "<pad>", "<eos>", " "
LONGEST = 128  # bytes without a space that are matched at once: the cost of a match goes with the square
BYTE_LEVEL = normalizers.ByteLevel()


class Entry(NamedTuple):
    """One entry of the vocabulary.

    Attributes:
        token: its string in tokenizer.json.
        kind: mark, root, suffix, subword, letter or byte.
        forms: texts that it stands for; several where they share the id.
        rule: of several forms.
        exact: whether it is a form that also has a shared id; `shared` is that.
    """

    token: str
    kind: str
    forms: tuple[str, ...]
    rule: str = ""
    shared: int | None = None


def to_bytes(text: str) -> str:
    """The text with every byte of its UTF-8 as a character, as byte-level tokenizers have it."""
    return BYTE_LEVEL.normalize_str(text)


def byte_tokens() -> list[str]:
    """The 256 characters that stand for bytes."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def entries(dictionary: MorphDictionary, rule: str = "cascade") -> dict[int, Entry]:
    """{id: entry}: marks, morphemes in their order, bytes, and at the end the forms that share an id one by one. With
    another rule than the cascade no string is dead."""
    dead = dictionary.dead() if rule == "cascade" else {}
    found: dict[int, Entry] = {}
    fixed = {m.id for m in dictionary.morphemes if m.id is not None}
    following = iter(range(max(fixed, default=-1) + 1, 2**31))
    marks = {m.forms[0]: m for m in dictionary.morphemes if m.kind == "mark"}
    for text, token in ((PAD, PAD), (EOS, EOS), (MARK, MARK), (SPACE, to_bytes(SPACE))):
        at = marks[text].id if text in marks else None
        found[next(following) if at is None else at] = Entry(token, "mark", (text if text != MARK else "",))
    spread: list[tuple[int, str, str]] = []
    for m in dictionary.morphemes:
        if m.kind == "mark":
            continue
        at = next(following) if m.id is None else m.id
        if len(m.forms) == 1:
            found[at] = Entry(_token(m.forms[0], dead), m.kind, m.forms)
            continue
        found[at] = Entry(JOINED.join(map(to_bytes, m.forms)), m.kind, m.forms, m.rule)
        spread += [(at, m.kind, form) for form in m.forms]
    for letter in letters_of(dictionary):
        found[next(following)] = Entry(to_bytes(letter), "letter", (letter,))
    known = {entry.token for entry in found.values()} | {_token(form, dead) for _, _, form in spread}
    for token in byte_tokens():
        if token not in known:
            found[next(following)] = Entry(token, "byte", (token,))
    for at, kind, form in spread:
        found[next(following)] = Entry(_token(form, dead), kind, (form,), shared=at)
    return found


def _token(form: str, dead: dict[str, str]) -> str:
    return JOINED + to_bytes(form) if form in dead else to_bytes(form)


def backend(dictionary: MorphDictionary, table: dict[int, Entry]) -> Tokenizer:
    """The pipeline; it encodes to exact forms and decodes them."""
    cased = [(to_bytes(upper), MARK + to_bytes(lower)) for upper, lower in dictionary.case.items()]
    vocabulary = {entry.token: at for at, entry in table.items()}
    model = models.WordPiece(vocabulary, unk_token=PAD, continuing_subword_prefix="", max_input_chars_per_word=10**9)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([BYTE_LEVEL, *(normalizers.Replace(*pair) for pair in cased)])
    split = (pre_tokenizers.Split(mark, "isolated") for mark in (to_bytes(SPACE), MARK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, pre_tokenizers.FixedLength(LONGEST)])
    raised = (decoders.Replace(lower, upper) for upper, lower in cased)
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), *raised, decoders.ByteLevel()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (PAD, EOS)])
    return tokenizer
