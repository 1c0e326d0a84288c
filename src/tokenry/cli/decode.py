"""decode: generate with any combination of decode methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from .shared import (
    as_json,
    check_writable,
    example,
    load_model,
    model_options,
    parse_methods,
    progress,
    read_text,
)


@click.command(
    epilog=example('tokenry decode --method antislop -o phrases=slop.txt "Write a story about a lighthouse"')
)
@click.argument("prompt", required=False)
@click.option("--prompts", "prompts_path", help="File with a prompt a line; prints a JSON line for each.")
@click.option("--method", "slugs", multiple=True, help="A decode method; may be repeated.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--max-new-tokens", default=256, show_default=True)
@click.option("--greedy", is_flag=True, help="Take the most probable token instead of sampling.")
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--min-p", default=0.05, show_default=True)
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--top-k", default=0, show_default=True, help="0: no limit.")
@click.option("--seed", default=0, show_default=True)
@click.option("--batch-size", default=16, show_default=True, help="Prompts at a time with --prompts.")
@click.option("--raw", is_flag=True, help="Continue the prompt itself, without the chat template.")
@click.option("--save-pairs", help="Write the rewinds as preference pairs (JSON lines).")
@model_options
def decode(
    prompt: str | None,
    prompts_path: str | None,
    slugs: tuple[str, ...],
    options: tuple[str, ...],
    max_new_tokens: int,
    greedy: bool,
    temperature: float,
    min_p: float,
    top_p: float,
    top_k: int,
    seed: int,
    batch_size: int,
    raw: bool,
    save_pairs: str | None,
    model_name: str,
    dtype: str | None,
    device: str | None,
    json_output: bool,
) -> None:
    """Generate with decode methods; one prompt streams as it goes. PROMPT '-' reads standard input."""
    methods = parse_methods(slugs, options, "decode")
    prompts = read_prompts(prompt, prompts_path)
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} leaves nothing to generate; give a number >= 1")
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} is not allowed; give a number >= 1")
    sampling = sampling_options(greedy, temperature, min_p, top_p, top_k)
    if save_pairs:
        check_writable(save_pairs)
        Path(save_pairs).write_text("", encoding="utf-8")
    settings = {"methods": methods, "chat": not raw, "max_new_tokens": max_new_tokens, **sampling}
    for method in methods:
        if method.caution:
            click.echo(f"{method.slug}: {method.caution}", err=True)
    loaded = load_model(model_name, dtype, device)
    if prompts_path:
        generate_many(loaded, prompts, settings, seed, batch_size, save_pairs)
    else:
        generate_one(loaded, prompts[0], settings, seed, save_pairs, json_output)


def read_prompts(prompt: str | None, path: str | None) -> list[str]:
    if (prompt is None) == (path is None):
        raise InputError("give one PROMPT, or a file of them with --prompts")
    if path is not None:
        prompts = [line for line in read_text(path, "prompts").splitlines() if line.strip()]
        if not prompts:
            raise InputError(f"the file {path!r} has no prompts; write one a line")
        return prompts
    text = read_text("-", "prompt") if prompt == "-" else prompt
    if not text.strip():
        raise InputError("the prompt is empty; give some text to continue")
    return [text]


def generate_one(
    loaded: Any, prompt: str, settings: dict[str, Any], seed: int, save_pairs: str | None, json_output: bool
) -> None:
    """Stream one text, or print it with its repairs as JSON."""
    from ..decode import generate

    model, tokenizer = loaded
    streamers = [] if json_output else [screen(tokenizer)]
    output = generate(model, tokenizer, prompt, streamers=streamers, seed=seed, **settings)
    add_pairs(save_pairs, output)
    stats = getattr(output, "stats", None)
    if json_output:
        events = [{k: v for k, v in vars(e).items() if k != "context_ids"} for e in output.events]
        calls = {"forward_calls": output.forward_calls, "token_forwards": output.token_forwards}
        calls |= stats.summary() if stats else {}
        as_json({"text": output.texts[0], "ids": output.new_ids[0], **strategy(output, 0), "events": events, **calls})
    elif output.events:
        click.echo(f"({len(output.events)} repairs; --json lists them)", err=True)
    if stats and stats.in_words() and not json_output:
        click.echo(f"({stats.in_words()})", err=True)


def screen(tokenizer: Any) -> Any:
    """A streamer that shows a text as it grows. It ends a line only if it has begun one: a refusal stands alone."""
    from transformers import TextStreamer

    class Screen(TextStreamer):
        def end(self) -> None:
            if not self.next_tokens_are_prompt:
                super().end()

    return Screen(tokenizer, skip_prompt=True, skip_special_tokens=True)


def generate_many(
    loaded: Any, prompts: list[str], settings: dict[str, Any], seed: int, size: int, save_pairs: str | None
) -> None:
    """A JSON line for each prompt as its batch is done; the seed of a batch is `seed` + its first prompt's number."""
    from ..decode import generate

    with progress("decode", len(prompts)) as update:
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            output = generate(*loaded, batch, seed=seed + start, **settings)
            add_pairs(save_pairs, output)
            for b, (prompt, text) in enumerate(zip(batch, output.texts)):
                click.echo(json.dumps({"prompt": prompt, "text": text, **strategy(output, b)}, ensure_ascii=False))
            update(advance=len(batch))


def strategy(output: Any, row: int) -> dict[str, str]:
    """How a row was answered, where a method has chosen that."""
    return {"strategy": output.strategy[row]} if "strategy" in output else {}


def add_pairs(path: str | None, output: Any) -> None:
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in output.pairs)


def sampling_options(greedy: bool, temperature: float, min_p: float, top_p: float, top_k: int) -> dict[str, Any]:
    """Keyword arguments of `generate`, checked."""
    if greedy:
        return {"do_sample": False}
    for name, value, allowed, text in (
        ("temperature", temperature, temperature > 0, "a number > 0, or use --greedy"),
        ("min-p", min_p, 0 <= min_p <= 1, "a number in [0, 1]"),
        ("top-p", top_p, 0 < top_p <= 1, "a number in (0, 1]"),
        ("top-k", top_k, top_k >= 0, "a number >= 0"),
    ):
        if not allowed:
            raise InputError(f"--{name} {value} is not allowed; give {text}")
    return {"do_sample": True, "temperature": temperature, "min_p": min_p, "top_p": top_p, "top_k": top_k}
