"""profile: find the words and phrases that a model overuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import click

from ..core.errors import InputError
from ..core.fields import Count, Times, Tokens
from ..core.files import records_of
from ..core.outputs import check_file, write_text
from .options import (
    Number,
    as_json,
    example,
    force_option,
    load_model,
    model_options,
    progress,
    read_entries,
    read_text,
    refuse_unused,
    say,
)

BATCH = 32  # prompts written to at a time
SAMPLING = {"do_sample": True, "temperature": 1.0, "min_p": 0.05, "top_k": 0}
REMEDY = 'give lines like {"prompt": "...", "text": "..."}, as `tokenry decode --prompts` prints them'
WRITING = ("--model", "--dtype", "--device", "--trust-remote-code", "--prompts", "--draws", "--max-new-tokens")


@click.command(epilog=example("tokenry profile --model FOLDER --output slop.txt"))
@click.argument("texts", nargs=-1, metavar="[TEXTS]...")
@click.option("--prompts", multiple=True, help="What the model writes to, one a line; default: 112 writing prompts.")
@click.option("--draws", type=Number(Count), default=4, show_default=True, help="Texts for each prompt.")
@click.option("--max-new-tokens", type=Number(Tokens), default=160, show_default=True)
@click.option("--words", type=Number(Times), default=150, show_default=True, help="Single words at most.")
@click.option("--phrases", type=Number(Times), default=300, show_default=True, help="Phrases at most.")
@click.option("--output", help="Write the list, one entry a line, instead of showing it.")
@click.option("--save-texts", help="Write the texts (JSON lines), to profile them again.")
@force_option
@model_options
def profile(
    texts: tuple[str, ...],
    prompts: tuple[str, ...],
    draws: int,
    max_new_tokens: int,
    words: int,
    phrases: int,
    output: str | None,
    save_texts: str | None,
    force: bool,
    model_name: str,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
    json_output: bool,
) -> None:
    """List what a model overuses against human text, most common first: entries for `antislop -o phrases=FILE`.

    TEXTS are texts of the model, JSON lines as `tokenry decode --prompts` prints them; without any it writes some.
    """
    for path in filter(None, (output, save_texts)):
        check_file(path, force)
    if texts:
        refuse_unused((*WRITING, "--save-texts"), "with TEXTS, which are there already")
        rows = [row for path in texts for row in read_rows(path)]
    else:
        asked = [read_entries(path, "prompts", "write one a line") for path in prompts or default_prompts()]
        loaded = load_model(model_name, dtype, device, trust_remote_code)
        rows = write(loaded, asked, draws, max_new_tokens)
    if save_texts:
        write_text(save_texts, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    from ..judge.text.overused import overused

    found = overused([row["prompt"] for row in rows], [row["text"] for row in rows], words, phrases)
    if not found:
        raise InputError(f"{len(rows)} texts overuse nothing to several prompts; profile more, to different prompts")
    if output:
        write_text(output, "".join(entry.text + "\n" for entry in found))
        click.echo(f"saved: {output}; {len(found)} entries of {len(rows)} texts", err=True)
    if json_output:
        as_json([asdict(entry) for entry in found])
    elif not output:
        say("\n".join(entry.text for entry in found))


def default_prompts() -> list[str]:
    """The files of prompts that the built-in list was made with."""
    folder = resources("tokenry.data") / "prompts"
    return [str(Path(str(folder / f"{name}_prompts.txt"))) for name in ("profile", "general")]


def read_rows(path: str) -> list[dict[str, str]]:
    """The prompts and texts of a file of JSON lines."""

    def check(row: dict[str, Any], where: str) -> dict[str, str]:
        if not all(isinstance(row.get(name), str) for name in ("prompt", "text")):
            raise InputError(f"{where} has no 'prompt' and 'text'; {REMEDY}")
        return {name: row[name] for name in ("prompt", "text")}

    return records_of(read_text(path, "file of texts"), path, "texts", REMEDY, check)


def write(loaded: Any, prompts: Sequence[Sequence[str]], draws: int, max_new_tokens: int) -> list[dict[str, str]]:
    """What the model writes to each file of prompts, `draws` times."""
    from ..decode import generate

    model, tokenizer = loaded
    rows: list[dict[str, str]] = []
    with progress("profile", draws * sum(map(len, prompts))) as update:
        for draw in range(draws):
            for asked in prompts:
                for start in range(0, len(asked), BATCH):
                    batch = asked[start : start + BATCH]
                    options = {**SAMPLING, "seed": 1000 * draw + start, "max_new_tokens": max_new_tokens}
                    output = generate(model, tokenizer, batch, **options)
                    rows += [{"prompt": prompt, "text": text} for prompt, text in zip(batch, output.texts)]
                    update(advance=len(batch))
    return rows
