"""Which tokens of a tokenizer are words or morphemes of a language, and which are indivisible."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ...core.calibration import spearman
from ...core.errors import InputError
from ...text.token_text import check_encodable
from .boundaries import Cuts, inner_cuts
from .lexicon import Lexicon
from .measures import token_offsets
from .report import Estimate, lossy_characters, show

__all__ = [
    "Correlation",
    "IntegrityReport",
    "Token",
    "boundary_f1",
    "colored_by_kind",
    "correlate",
    "integrity",
    "integrity_rows",
    "kinds_of_tokens",
    "parts_by_kind",
]

RESAMPLES = 200
KINDS = ("pure", "valid", "invalid", "fragment", "other")  # pure tokens are valid, too
SHOWN = 12


class Token(NamedTuple):
    """A token as it stands in a text: what it says in lower case, without blanks, and what that is."""

    start: int
    end: int
    key: str
    kind: str


@dataclass(frozen=True)
class IntegrityReport:
    """One tokenizer on texts of one language. Shares are of distinct tokens or of all, as `level` says.

    Attributes:
        tr, pure: percent of tokens that are words or morphemes, and that are roots or single morphemes.
        tr_letters, pure_letters: the same of tokens of letters alone.
        fertility: tokens per word; `continued`: percent of words of several tokens.
        examples: the most frequent tokens of each kind.
    """

    name: str
    level: str
    vocabulary: int
    tokens: int
    unique: int
    seconds: float
    tr: Estimate
    pure: Estimate
    tr_letters: Estimate
    pure_letters: Estimate
    fertility: Estimate
    tokens_per_character: float
    continued: float
    examples: dict[str, list[str]]
    lossy: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def kinds_of_tokens(tokenizer: PreTrainedTokenizerBase, text: str, lexicon: Lexicon) -> list[Token]:
    """Every token of a text but marks, which stand for no character of their own.

    A token of a part of a character is a "fragment"; one that is blank or holds something else than letters "other".
    """
    ids, spans = token_offsets(tokenizer, text)
    alone = {id: str(tokenizer.decode([id])) for id in set(ids)}
    kept = [span for id, span in zip(ids, spans) if alone[id] != ""]
    found = []
    for at, (start, end) in enumerate(kept):
        neighbors = [kept[other] for other in (at - 1, at + 1) if 0 <= other < len(kept)]
        part = start == end or any(a < end and start < b for a, b in neighbors)
        key = lexicon.fold(text[start:end].strip())
        found.append(Token(start, end, key, "fragment" if part else kind_of(key, lexicon)))
    return found


def kind_of(key: str, lexicon: Lexicon) -> str:
    """pure, valid, invalid or other."""
    if not key.isalpha():
        return "other"
    if lexicon.is_morpheme(key) or lexicon.is_root(key):
        return "pure"
    return "valid" if lexicon.is_word(key) else "invalid"


def integrity(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    lexicon: Lexicon,
    level: str = "type",
    counting: str = "clean",
    timing_repeats: int = 5,
    name: str = "",
) -> IntegrityReport:
    """Score a tokenizer on documents.

    Args:
        level: "type" counts each distinct token once, as the paper does; "occurrence" as often as it occurs.
        counting: "official" counts as the paper's code does, over what each id alone decodes to, split at blanks.

    Raises:
        InputError: no text, half a surrogate pair, or a tokenizer without offsets.
    """
    texts = _checked(texts)
    seconds = _seconds(tokenizer, texts, timing_repeats)
    documents = [kinds_of_tokens(tokenizer, text, lexicon) for text in texts]
    tokens = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    rows, kinds = _clean(documents) if counting == "clean" else _official(tokenizer, texts, lexicon)
    letters = np.array([kind in ("pure", "valid", "invalid") for _, kind in kinds])
    valid = np.array([kind in ("pure", "valid") for _, kind in kinds])
    pure = np.array([kind == "pure" for _, kind in kinds])
    everything = np.ones(len(kinds), bool)
    shares = [_share(rows, hit, of, level) for of in (everything, letters) for hit in (valid, pure)]
    words = np.array([len(text.split()) for text in texts], float)
    return IntegrityReport(
        name=name,
        level=level,
        vocabulary=len(tokenizer),
        tokens=sum(tokens),
        unique=len(kinds),
        seconds=seconds,
        tr=shares[0],
        pure=shares[1],
        tr_letters=shares[2],
        pure_letters=shares[3],
        fertility=_interval(lambda pick: float(np.array(tokens)[pick].sum() / words[pick].sum()), len(texts)),
        tokens_per_character=sum(tokens) / sum(map(len, texts)),
        continued=_continued(texts, documents),
        examples=_examples(documents),
        lossy=sum(lossy_characters(tokenizer, "".join(texts)).values()),
    )


def _checked(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise InputError("texts is one string; give a list of documents, for example [text]")
    for number, text in enumerate(texts):
        check_encodable(text, f"document {number}")
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise InputError("there is no text to score on; give at least one document with a word in it")
    return kept


def _seconds(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], repeats: int) -> float:
    """Median seconds of encoding and of decoding each id alone, as the paper times it."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for ids in tokenizer(list(texts), add_special_tokens=False).input_ids:
            for id in ids:
                tokenizer.decode([id])
        found.append(time.perf_counter() - start)
    return float(np.median(found))


Kinds = list[tuple[str, str]]


def _clean(documents: Sequence[Sequence[Token]]) -> tuple[list[np.ndarray], Kinds]:
    """For each document the places of its tokens among the distinct (key, kind)."""
    place: dict[tuple[str, str], int] = {}
    rows = [np.array([place.setdefault((t.key, t.kind), len(place)) for t in tokens], int) for tokens in documents]
    return rows, list(place)


def _official(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], lexicon: Lexicon
) -> tuple[list[np.ndarray], Kinds]:
    """The paper's counting: keys are what ids decode to, split at blanks, and one answer overwrites another.

    What stands in the list unstripped is valid, and so is its key; of the other keys an analyser is asked, and those
    that are the root of any of them are pure.
    """
    surfaces = [
        [str(tokenizer.decode([id])) for id in tokenizer(text, add_special_tokens=False).input_ids] for text in texts
    ]
    distinct = {surface for row in surfaces for surface in row}
    listed = {s for s in distinct if s and (lexicon.is_morpheme(s) or lexicon.is_root(s))}
    valid = dict.fromkeys(listed, True)
    for key in {key for surface in distinct - listed for key in surface.split()}:
        valid[key] = lexicon.is_word(lexicon.fold(key))
    roots = {lexicon.root(lexicon.fold(key)) for key in valid}
    pure = {key for key in valid if lexicon.is_morpheme(key) or lexicon.is_root(key) or key in roots}
    kinds = [(key, "pure" if key in pure and ok else "valid" if ok else "invalid") for key, ok in valid.items()]
    place = {key: at for at, key in enumerate(valid)}
    keys = [[s] if s in listed else s.split() for row in surfaces for s in row]
    ends = np.cumsum([len(row) for row in surfaces])
    rows = [[k for part in keys[a:b] for k in part] for a, b in zip([0, *ends], ends)]
    return [np.array([place[key] for key in row], int) for row in rows], kinds


def _share(rows: Sequence[np.ndarray], hit: np.ndarray, of: np.ndarray, level: str) -> Estimate:
    """Percent of tokens in `of` that are in `hit`."""

    def value(pick: np.ndarray) -> float:
        counts = np.bincount(np.concatenate([rows[i] for i in pick]), minlength=len(hit))
        weight = (counts > 0 if level == "type" else counts) * of
        return 100 * float((weight * hit).sum() / weight.sum()) if weight.sum() else float("nan")

    return _interval(value, len(rows))


def _interval(compute: Any, n: int) -> Estimate:
    """A number with its bootstrap interval over documents, moved so that its middle is the number: a resample has fewer
    distinct documents, and so fewer distinct tokens, which shifts what is counted once."""
    value = compute(np.arange(n))
    if n == 1:
        return Estimate(value, -math.inf, math.inf)
    draw = np.random.default_rng(0)
    low, middle, high = np.nanpercentile([compute(draw.integers(0, n, n)) for _ in range(RESAMPLES)], [2.5, 50, 97.5])
    return Estimate(value, value + float(low - middle), value + float(high - middle))


def _continued(texts: Sequence[str], documents: Sequence[Sequence[Token]]) -> float:
    """Percent of words between blanks that have a token beginning inside them."""
    words = several = 0
    for text, tokens in zip(texts, documents):
        starts, at = {token.start for token in tokens}, 0
        for word in text.split():
            at = text.index(word, at)
            words += 1
            several += any(at < start < at + len(word) for start in range(at + 1, at + len(word)) if start in starts)
            at += len(word)
    return 100 * several / words


def _examples(documents: Sequence[Sequence[Token]]) -> dict[str, list[str]]:
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for token in (token for tokens in documents for token in tokens):
        counts[token.kind][token.key] += 1
    return {kind: [key for key, _ in found.most_common(SHOWN)] for kind, found in counts.items() if found}


# --- borders ---------------------------------------------------------------------------------------------------------


def boundary_f1(tokenizer: PreTrainedTokenizerBase, words: Sequence[Sequence[str]]) -> Cuts:
    """Cuts inside words against gold ones: `.precision`, `.recall` and `.f1` of the sums.

    Args:
        words: each as a list of its morphemes; encoded alone.

    Raises:
        InputError: no word, or one that is not cut into a list.
    """
    if not words:
        raise InputError("there is no word to cut; give at least one, as the list of its parts")
    total = Cuts(0, 0, 0)
    for parts in words:
        gold, word = inner_cuts(parts), "".join(parts)
        made = {end for _, end in token_offsets(tokenizer, word)[1] if 0 < end < len(word)}
        total += Cuts(len(made & gold), len(made), len(gold))
    return total


# --- correlation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Correlation:
    """How a metric of tokenizers goes with a score of models.

    Attributes:
        r: Pearson's, with its Fisher interval; `rank`: Spearman's.
        without_one: the least and the greatest r with one of them left out.
        says: all of it in a sentence, and how little so few of them say.
    """

    n: int
    r: float
    low: float
    high: float
    rank: float
    without_one: tuple[float, float]

    @property
    def says(self) -> str:
        text = f"r = {self.r:.2f} [{self.low:.2f}, {self.high:.2f}] over {self.n} tokenizers, rank {self.rank:.2f}"
        text += f", {self.without_one[0]:.2f} to {self.without_one[1]:.2f} with one left out"
        if self.low <= 0 <= self.high:
            text += "; this tells no direction"
        return text + ("; fewer than 10 tokenizers say little" if self.n < 10 else "")


def correlate(metric: Sequence[float], scores: Sequence[float]) -> Correlation:
    """Pearson's r with the interval tanh(atanh r ± 1.96 / sqrt(n - 3)).

    Raises:
        InputError: different lengths, fewer than 4, what is no number, or a side that is constant.
    """
    a, b = np.asarray(metric, float), np.asarray(scores, float)
    if a.shape != b.shape or a.ndim != 1:
        raise InputError(f"{a.size} values of the metric for {b.size} scores; give one of each for every tokenizer")
    if len(a) < 4:
        raise InputError(f"{len(a)} tokenizers are too few for an interval; give at least 4, better 10")
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or a.std() == 0 or b.std() == 0:
        raise InputError("the metric or the scores are constant or no numbers; give finite ones that differ")
    r = _pearson(a, b)
    half = 1.96 / math.sqrt(len(a) - 3)
    middle = math.atanh(max(-1 + 1e-15, min(1 - 1e-15, r)))
    others = [_pearson(np.delete(a, i), np.delete(b, i)) for i in range(len(a))]
    left_out = (float(np.nanmin(others)), float(np.nanmax(others)))
    return Correlation(len(a), r, math.tanh(middle - half), math.tanh(middle + half), spearman(a, b), left_out)


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


# --- for the tokenizer report ----------------------------------------------------------------------------------------

STYLES = {
    "pure": "white on dark_green",
    "valid": "white on dark_blue",
    "invalid": "white on dark_red",
    "fragment": "white on purple4",
    "other": "white on grey23",
}


def integrity_rows(reports: Sequence[IntegrityReport]) -> list[tuple[str, list[str]]]:
    """(heading, cell of each tokenizer)."""
    return [
        (f"% TR, {reports[0].level} level ↑", [show(report.tr, "{:.1f}") for report in reports]),
        ("% pure ↑", [show(report.pure, "{:.1f}") for report in reports]),
        ("% TR of letter tokens ↑", [show(report.tr_letters, "{:.1f}") for report in reports]),
        ("% pure of letter tokens ↑", [show(report.pure_letters, "{:.1f}") for report in reports]),
        ("% words cut ↓", [f"{report.continued:.1f}" for report in reports]),
        ("distinct tokens", [f"{report.unique:,}" for report in reports]),
        ("seconds", [f"{report.seconds:.4f}" for report in reports]),
    ]


def parts_by_kind(text: str, tokens: Sequence[Token]) -> list[tuple[str, str]]:
    """The text as (piece, kind); a character of several tokens is one piece, and text of none has no kind."""
    found, at = [], 0
    for token in tokens:
        if token.end <= at:
            continue
        start = max(token.start, at)
        found += [(text[at:start], "")] if start > at else []
        found.append((text[start : token.end], token.kind))
        at = token.end
    return found + ([(text[at:], "")] if at < len(text) else [])


def colored_by_kind(parts: Sequence[tuple[str, str]]) -> Text:
    """Pieces for a terminal: green pure, blue valid, red neither, purple parts of characters, gray the rest."""
    out = Text()
    for text, kind in parts:
        out.append(text.replace("\n", "↵\n"), STYLES.get(kind, ""))
    return out
