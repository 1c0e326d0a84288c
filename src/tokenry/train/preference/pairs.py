"""Single-token preference pairs: one context, one rejected next token, several chosen ones.

A pair is a dict with `prompt_ids` (token ids of the context), `chosen_ids` (list) and `rejected_id`. They come from the
rewinds of a decode run (`DecodeOutput.pairs`, `tokenry decode --save-pairs`) or from text.
"""

from __future__ import annotations

import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, Field, Strict
from transformers import PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.files import read_records
from ...core.schemas import Fields, checked
from ...text.ngrams import NGrams
from ...text.words import fold, inside_word, words

__all__ = ["balance_pairs", "check_pairs", "pairs_from_rewinds", "pairs_from_text", "read_pairs"]

Pair = dict[str, Any]
MOST_PROBABLE = 50  # candidates looked at, best first
MOST_CHOSEN = 20  # of these, kept from the least probable up
TAIL = 40  # tokens of context in which a candidate might complete a banned pattern
FUNCTION_WORDS = frozenset(  # the 49 of the official data loader
    """a an and are at be been being but by can could did do does else for had has have how if in is may might must of
    on or shall should that the then these this those to was were what when where who whom why will would""".split()
)


# --- files ---------------------------------------------------------------------------------------------------------

TokenId = Annotated[int, Field(ge=0, lt=2**32)]


class RewindRow(Fields):
    """What a decode run saves of a rewind."""

    context_ids: list[TokenId]
    rejected: TokenId
    rejected_text: str | None = None
    rule: str
    candidates: list[Annotated[tuple[TokenId, float], Strict(False)]]


class IdRow(Fields):
    """A pair of token ids."""

    prompt_ids: list[TokenId] = Field(min_length=1)
    chosen_ids: list[TokenId]
    rejected_id: TokenId


class TextRow(Fields):
    """A pair of texts."""

    prompt: str = Field(min_length=1)
    chosen: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
    rejected: str


FORMS: dict[str, type[Fields]] = {"context_ids": RewindRow, "prompt_ids": IdRow, "prompt": TextRow}
REMEDY = (
    "give rewinds (context_ids, rejected, rule, candidates), ids (prompt_ids, chosen_ids, rejected_id) or text "
    "(prompt, chosen, rejected), all lines alike"
)


def read_pairs(path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> list[dict[str, Any]]:
    """The JSON lines of a file: rewinds, pairs of ids, or pairs of text, as the first line is.

    Args:
        tokenizer: of the model to train; with it, texts that are not one token are refused by line too.

    Raises:
        InputError: a file without pairs, or the first line with a field that is missing or wrong.
    """
    forms: list[str] = []

    def check(row: dict[str, Any], where: str) -> dict[str, Any]:
        forms.append(forms[0] if forms else _form(row, where))
        found = checked(FORMS[forms[0]], row, where, REMEDY).model_dump()
        if tokenizer is not None:
            _check_words(found, where, tokenizer)
        return found

    return read_records(path, "pairs", "make them with tokenry decode --save-pairs, banning what does occur", check)


def _form(row: Mapping[str, Any], where: str) -> str:
    for key in FORMS:
        if key in row:
            return key
    raise InputError(f"{where} with the keys {sorted(row)} is not understood; {REMEDY}")


def _check_words(row: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse words that are other tokens here than they are taken for."""
    try:
        if "rejected_text" in row:
            _check_tokenizer(tokenizer, row)
        elif "prompt" in row:
            pairs_from_text([row], tokenizer)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def to_pairs(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """Pairs of ids from any of the three forms, which is told by the keys of the first row."""
    convert = {"context_ids": pairs_from_rewinds, "prompt": pairs_from_text}.get(_form(rows[0], "a pair"))
    return [dict(row) for row in rows] if convert is None else convert(rows, tokenizer)


# --- from rewinds --------------------------------------------------------------------------------------------------


def pairs_from_rewinds(
    rewinds: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, min_p: float = 0.01
) -> list[Pair]:
    """One pair for each context at which a decode run went back (arXiv 2510.15061, capture of pairs).

    The rejected token is the one that was taken back; chosen are the alternatives at its place, from the least
    probable up, without those that would begin or complete a banned pattern. A later rewind at the same context
    replaces the earlier one; contexts with no alternative give no pair.

    Args:
        rewinds: `DecodeOutput.pairs`.
        min_p: smallest probability of an alternative, as a share of the highest one.

    Raises:
        InputError: the rewinds come from another tokenizer.
    """
    rewinds = list(rewinds)
    patterns = _Patterns(tokenizer, {r["rule"] for r in rewinds})
    tried: dict[tuple[int, ...], set[int]] = defaultdict(set)
    pairs: dict[tuple[int, ...], Pair] = {}
    for rewind in rewinds:
        context, rejected = tuple(rewind["context_ids"]), rewind["rejected"]
        _check_tokenizer(tokenizer, rewind)
        tried[context].add(rejected)
        options = [(t, p) for t, p in rewind["candidates"] if t not in tried[context]]
        best = max((p for _, p in options), default=0.0)
        options = sorted((o for o in options if o[1] >= min_p * best), key=lambda o: -o[1])[:MOST_PROBABLE]
        good = (token for token, _ in reversed(options) if patterns.allow(context, token))
        chosen = [token for token, _ in zip(good, range(MOST_CHOSEN))]
        pairs.pop(context, None)
        if chosen:
            pairs[context] = {"prompt_ids": list(context), "chosen_ids": chosen, "rejected_id": rejected}
    return list(pairs.values())


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, rewind: Mapping[str, Any]) -> None:
    text = rewind.get("rejected_text")
    own = _text_of(tokenizer, [rewind["rejected"]]) if rewind["rejected"] < len(tokenizer) else ""
    if text is not None and (not own or not text.startswith(own.rstrip("\ufffd"))):
        raise InputError(
            f"the rejected token {rewind['rejected']} is {own!r} for this tokenizer but began {text!r}; "
            "train the model that the pairs were made with"
        )


def _text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return cast(str, tokenizer.decode(list(ids)))


class _Patterns:
    """The banned patterns behind a set of rules, and whether a token would begin or complete one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: set[str]) -> None:
        self.tokenizer = tokenizer
        split = [rule.partition(":") for rule in rules]
        self.phrases = {fold(text) for kind, _, text in split if kind == "phrase"}
        ngrams = [text.split() for kind, _, text in split if kind == "ngram"]
        self.ngrams = NGrams(ngrams)
        starts = self.phrases | {ngram[0] for ngram in ngrams}
        self.prefixes = {text[:n] for text in starts for n in range(2, len(text) + 1)}

    def allow(self, context: tuple[int, ...], token: int) -> bool:
        word = fold(_text_of(self.tokenizer, [token]).strip())
        if len(word) < 2 or "*" in word or not any(map(str.isalnum, word)) or word in self.prefixes:
            return False
        before = _text_of(self.tokenizer, context[-TAIL:])
        text = _text_of(self.tokenizer, [*context[-TAIL:], token])
        known = len(fold(before))
        return not any(self._ends(fold(text), phrase, known) for phrase in self.phrases) and not self._completes(text)

    @staticmethod
    def _ends(text: str, phrase: str, known: int) -> bool:
        """Whether the phrase ends after the first `known` characters of the folded text."""
        start = text.find(phrase, max(0, known - len(phrase) + 1))
        while start >= 0:
            if not inside_word(text, start) and not inside_word(text, start + len(phrase)):
                return True
            start = text.find(phrase, start + 1)
        return False

    def _completes(self, text: str) -> bool:
        begun, found = [], []
        for word in words(text) if self.ngrams.root.children else ():
            begun, found = self.ngrams.step(begun, word)
        return bool(found)


# --- from text -----------------------------------------------------------------------------------------------------


def pairs_from_text(rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """Pairs from `prompt` (text), `chosen` (list of texts) and `rejected` (text).

    Raises:
        InputError: a chosen or rejected text is not one token, or joins with the end of the prompt.
    """
    pairs = []
    for row in rows:
        prompt = tokenizer.encode(row["prompt"], add_special_tokens=False)
        chosen = [row["chosen"]] if isinstance(row["chosen"], str) else row["chosen"]
        ids = [_one_token(tokenizer, row["prompt"], prompt, text) for text in (*chosen, row["rejected"])]
        pairs.append({"prompt_ids": prompt, "chosen_ids": ids[:-1], "rejected_id": ids[-1]})
    return pairs


def _one_token(tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: list[int], text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        pieces = ", ".join(repr(tokenizer.decode([i])) for i in ids)
        raise InputError(f"{text!r} is {len(ids)} tokens ({pieces}); chosen and rejected texts must be one token each")
    if tokenizer.encode(prompt + text, add_special_tokens=False) != prompt_ids + ids:
        raise InputError(
            f"{text!r} joins with the end of the prompt {prompt[-20:]!r} into other tokens; move the border, for "
            "example put the space before the word"
        )
    return ids[0]


# --- checks and balance --------------------------------------------------------------------------------------------


def check_pairs(pairs: Iterable[Pair], vocab_size: int) -> None:
    """Refuse pairs that cannot be learned from, naming the first one."""
    for number, pair in enumerate(pairs, 1):
        missing = [name for name in IdRow.model_fields if name not in pair]
        if missing:
            raise InputError(f"pair {number} has no {missing[0]!r}; give {', '.join(IdRow.model_fields)}")
        chosen, rejected = pair["chosen_ids"], pair["rejected_id"]
        if not pair["prompt_ids"]:
            raise InputError(f"pair {number} has an empty context; give at least one token")
        if not chosen:
            raise InputError(f"pair {number} has no chosen token; give at least one")
        if rejected in chosen:
            raise InputError(f"pair {number} has the rejected token {rejected} among the chosen ones; remove it there")
        if len(set(chosen)) < len(chosen):
            raise InputError(f"pair {number} names a chosen token twice; name each once")
        for token in (*chosen, rejected, *pair["prompt_ids"]):
            if not 0 <= token < vocab_size:
                raise InputError(f"pair {number} has the token {token}; this model has tokens 0 to {vocab_size - 1}")


def balance_pairs(
    pairs: Sequence[Pair],
    rho: float = 0.8,
    max_examples: int | None = 1000,
    min_chosen: int = 4,
    seed: int = 3407,
) -> list[Pair]:
    """Choose pairs so that frequent rejected tokens do not drown the rare ones (arXiv 2510.15061, data loader).

    A rejected token seen c times, more often than the median m, counts (m / c)^rho of its share. The shares are those
    before any filter; a token that has too few pairs leaves its places to the one furthest below its share.

    Args:
        rho: 0 leaves the shares alone, 1 flattens everything above the median.
        max_examples: most pairs to keep; None for all.
        min_chosen: pairs with fewer chosen tokens are dropped.

    Raises:
        InputError: nothing is left.
    """
    if not 0 <= rho <= 1:
        raise InputError(f"rho={rho} is not allowed; give a number in [0, 1]")
    draw = random.Random(seed)
    rows = _shuffled(pairs, draw)
    counts = Counter(pair["rejected_id"] for pair in rows)
    median = statistics.median(counts.values()) if counts else 0
    weight = {r: c * (1 if c <= median else (median / c) ** rho) for r, c in counts.items()}
    share = {r: w / sum(weight.values()) for r, w in weight.items()}
    rows = [pair for pair in rows if len(pair["chosen_ids"]) >= min_chosen]
    if not rows:
        raise InputError(
            f"none of {len(pairs)} pairs has {min_chosen} chosen tokens or more; lower min_chosen or sample more"
        )
    total = min(max_examples or len(rows), len(rows))
    return _shuffled(_fill(_shuffled(rows, draw), share, total), draw)


def _shuffled(rows: Sequence[Pair], draw: random.Random) -> list[Pair]:
    return draw.sample(list(rows), len(rows))


def _fill(rows: list[Pair], share: Mapping[int, float], total: int) -> list[Pair]:
    """`total` rows by quota, then from whichever rejected token is furthest below its share."""
    waiting: dict[int, list[Pair]] = defaultdict(list)
    taken: Counter[int] = Counter()
    picked: list[Pair] = []
    for pair in rows:
        token = pair["rejected_id"]
        if len(picked) < total and taken[token] < round(share[token] * total):
            picked.append(pair)
            taken[token] += 1
        else:
            waiting[token].append(pair)
    while len(picked) < total:
        token = max(waiting, key=lambda t: share[t] - taken[t] / max(len(picked), 1))
        picked.append(waiting[token].pop(0))
        taken[token] += 1
        if not waiting[token]:
            del waiting[token]
    return picked


def without_function_words(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
    """The pairs whose rejected token is not a function word such as " the", which no text can do without."""
    kept = [p for p in pairs if _text_of(tokenizer, [p["rejected_id"]]).strip().lower() not in FUNCTION_WORDS]
    if pairs and not kept:
        raise InputError(
            f"all {len(pairs)} pairs reject a function word; ban patterns that begin with another word, or set "
            "function_words=true"
        )
    return kept
