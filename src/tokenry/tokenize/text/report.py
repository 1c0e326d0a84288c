"""Tokenizers side by side on one text: numbers with intervals, and the text colored by token."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ...core.errors import InputError
from ...models.checkpoint_files import read_tokenizer, reading
from ...models.load import DEFAULT, load
from ..morphology import tokenizer as _morphology  # noqa: F401 (registers its class with AutoTokenizer)
from .measures import boundary_stability, token_counts, token_offsets, token_size_profile
from .noise import ocr_errors

__all__ = [
    "Estimate",
    "Piece",
    "TokenizerReport",
    "colored",
    "load_tokenizer",
    "render",
    "report_table",
    "stretches",
    "token_pieces",
    "tokenizer_report",
]

UNIT = 400  # characters that are resampled, and aligned, together
PAIRS = 300  # units that are corrupted for boundary stability
RESAMPLES = 2000
COLORS = ("white on grey23", "white on dark_blue", "white on dark_green", "white on purple4", "white on dark_red")
LENGTHS = ((1, 1), (2, 3), (4, 6), (7, 10), (11, None))


Further = Sequence[tuple[str, Sequence[str]]]


class Estimate(NamedTuple):
    """A number with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TokenizerReport:
    """One tokenizer on one text. `saved` is the share of tokens that it saves against the first tokenizer."""

    name: str
    vocabulary: int
    tokens: int
    tokens_per_character: Estimate
    tokens_per_word: Estimate
    saved: Estimate
    boundary_stability: Estimate
    lengths: dict[int, float]  # share of vocabulary strings of each length
    lossy: dict[str, int]  # characters of the text that do not come back, and how often they occur

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


class Piece(NamedTuple):
    """A stretch of text and the tokens that stand for it: several for parts of a character, none for lost text."""

    text: str
    ids: tuple[int, ...]


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer by name: a folder with tokenizer.json, "smollm2" or a hub id.

    Raises:
        InputError: a folder without a tokenizer, one that is broken or brings code that is not trusted, an unknown
            name, or a hub out of reach.
    """
    if name == DEFAULT:
        return load(DEFAULT).tokenizer
    folder = Path(os.path.expanduser(name))
    known = os.path.isdir(folder)  # as Path.is_dir, but False for a name that is too long
    if known and not (folder / "tokenizer.json").is_file():
        raise InputError(f"the folder {str(name)!r} has no tokenizer.json; give one that save_pretrained has written")
    if not known and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
        raise InputError(f"there is no tokenizer {str(name)!r}; give a folder that exists, {DEFAULT!r} or a hub id")
    with reading(str(name), "tokenizer"):
        return read_tokenizer(folder if known else str(name), trust_remote_code)


def tokenizer_report(
    tokenizers: Mapping[str, PreTrainedTokenizerBase], text: str, error_rate: float = 0.05, seed: int = 0
) -> list[TokenizerReport]:
    """Compare tokenizers on a text; every number comes with a bootstrap interval over stretches of 400 characters.

    Args:
        tokenizers: {name: tokenizer}; savings are against the first one.
        error_rate: recognition errors per character in the text that boundary stability compares with.
        seed: of the errors and of the bootstrap.

    Raises:
        InputError: no tokenizer, one without offsets, a text without words, or a rate out of range.
    """
    if not tokenizers:
        raise InputError("there is no tokenizer to report on; give at least one")
    if not text.strip():
        raise InputError("the text is empty; give some to count tokens of")
    units = stretches(text)
    pairs = _pairs(units, error_rate, seed)
    sizes = np.array([[len(unit), len(unit.split())] for unit in units], float)
    counts = {name: np.array(token_counts(t, units), float) for name, t in tokenizers.items()}
    first = next(iter(counts.values()))
    reports = []
    for name, tokenizer in tokenizers.items():
        stable = np.array([boundary_stability(tokenizer, [pair]) for pair in pairs])
        reports.append(
            TokenizerReport(
                name=name,
                vocabulary=len(tokenizer),
                tokens=int(counts[name].sum()),
                tokens_per_character=_ratio(counts[name], sizes[:, 0], seed),
                tokens_per_word=_ratio(counts[name], sizes[:, 1], seed),
                saved=_ratio(first - counts[name], first, seed),
                boundary_stability=_ratio(stable, np.ones(len(stable)), seed),
                lengths=token_size_profile(tokenizer),
                lossy=lossy_characters(tokenizer, text),
            )
        )
    return reports


def stretches(text: str) -> list[str]:
    """Stretches of at most 400 characters that join to the text, cut before whitespace where there is any."""
    return re.findall(rf".{{1,{UNIT}}}(?=\s|\Z)|.{{1,{UNIT}}}", text, flags=re.DOTALL)


def _pairs(units: Sequence[str], rate: float, seed: int) -> list[tuple[str, str]]:
    """(wrong, right) for units spread over the whole text; those in which no error fell say nothing."""
    chosen = units[:: -(-len(units) // PAIRS)]
    pairs = [(ocr_errors(unit, rate, f"{seed}-{i}"), unit) for i, unit in enumerate(chosen)]
    changed = [pair for pair in pairs if pair[0] != pair[1]]
    return changed or pairs


def _ratio(above: np.ndarray, below: np.ndarray, seed: int) -> Estimate:
    """Sum / sum over units with its percentile interval; one unit gives no interval."""
    value = float(above.sum() / below.sum())
    n = len(above)
    if n == 1:
        return Estimate(value, float("-inf"), float("inf"))
    draw, values = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        weight = np.bincount(draw.integers(0, n, n), minlength=n)
        values.append((weight @ above) / (weight @ below))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def lossy_characters(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, int]:
    """Characters of `text` that decoding does not give back, with how often they occur, most frequent first."""
    lost = {}
    for character, count in Counter(text).most_common():
        ids = tokenizer(f"x{character}x", add_special_tokens=False).input_ids
        back = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if character not in back:
            lost[character] = count
    return lost


def token_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[Piece]:
    """The text cut at its tokens; the pieces join to the text.

    Whitespace that offsets leave out belongs to the next token.

    Raises:
        InputError: a tokenizer without offsets.
    """
    pieces: list[Piece] = []
    at = 0
    for token, (start, end) in zip(*token_offsets(tokenizer, text)):
        if end <= at and pieces:  # one more part of the same character
            pieces[-1] = Piece(pieces[-1].text, (*pieces[-1].ids, token))
            continue
        gap = text[at:start]
        if gap and not gap.isspace():
            pieces.append(Piece(gap, ()))
            at = start
        pieces.append(Piece(text[at:end], (token,)))
        at = end
    return pieces + ([Piece(text[at:], ())] if at < len(text) else [])


def colored(pieces: Iterable[Piece]) -> Text:
    """Pieces for a terminal: colors by turns, lost text in reverse, line ends shown."""
    out = Text()
    for number, piece in enumerate(pieces):
        style = COLORS[number % len(COLORS)] if piece.ids else "reverse red"
        out.append(piece.text.replace("\n", "↵\n"), style)
    return out


def report_table(reports: Sequence[TokenizerReport], further: Further = ()) -> Table:
    """The numbers for a terminal, one tokenizer a column.

    Args:
        further: (heading, cell of each tokenizer) of more rows.
    """
    table = Table(caption="in brackets: 95 % bootstrap intervals; length profile: share of vocabulary strings")
    table.add_column("")
    for report in reports:
        table.add_column(Text(report.name), overflow="fold")
    for heading, *cells in zip(HEADINGS, *map(_cells, reports)):
        table.add_row(heading, *map(Text, cells))
    for heading, cells in further:
        table.add_row(heading, *map(Text, cells))
    return table


HEADINGS = (
    "vocabulary",
    "tokens",
    "tokens / character ↓",
    "tokens / word ↓",
    "tokens saved ↑",
    "boundary stability ↑",
    "length profile",
    "lossy characters",
)


def _cells(report: TokenizerReport) -> list[str]:
    return [
        f"{report.vocabulary:,}",
        f"{report.tokens:,}",
        show(report.tokens_per_character, "{:.3f}"),
        show(report.tokens_per_word, "{:.2f}"),
        show(report.saved, "{:+.1%}"),
        show(report.boundary_stability, "{:.3f}"),
        _profile(report.lengths),
        _lossy(report.lossy),
    ]


def show(estimate: Estimate, form: str) -> str:
    """A number with its interval, where it has one."""
    if np.isinf(estimate.low):
        return form.format(estimate.value)
    return f"{form.format(estimate.value)} [{form.format(estimate.low)}, {form.format(estimate.high)}]"


def _profile(lengths: Mapping[int, float]) -> str:
    parts = []
    for low, high in LENGTHS:
        share = sum(s for length, s in lengths.items() if low <= length <= (high or length))
        name = f"{low}+" if high is None else str(low) if low == high else f"{low}-{high}"
        parts.append(f"{name}: {share:.0%}")
    return ", ".join(parts)


def _lossy(lossy: Mapping[str, int], most: int = 8) -> str:
    shown = " ".join(f"U+{ord(c):04X}" if c.isspace() or not c.isprintable() else c for c in list(lossy)[:most])
    rest = f" and {len(lossy) - most} more" if len(lossy) > most else ""
    return f"{shown}{rest} ({sum(lossy.values()):,} times)" if lossy else "none"


def render(
    reports: Sequence[TokenizerReport],
    pieces: Mapping[str, Sequence[Piece]],
    title: str = "Tokenizer report",
    further: Further = (),
    kinds: Mapping[str, Sequence[tuple[str, str]]] | None = None,
) -> str:
    """One self-contained HTML page: the numbers, and the pieces of each tokenizer side by side.

    Args:
        further: (heading, cell of each tokenizer) of more columns.
        kinds: for each tokenizer the text as (piece, kind of token, or nothing), colored by kind.
    """
    template = jinja2.Environment(autoescape=True).from_string(
        (files("tokenry.tokenize.text") / "report.html").read_text(encoding="utf-8")
    )
    rows = [
        {"name": report.name, "cells": [*_cells(report), *(cells[i] for _, cells in further)]}
        for i, report in enumerate(reports)
    ]
    headings = [*HEADINGS, *(heading for heading, _ in further)]
    return template.render(title=title, headings=headings, rows=rows, pieces=pieces, kinds=kinds or {})
