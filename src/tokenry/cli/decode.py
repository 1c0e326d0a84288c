"""decode: generate with any combination of decode methods."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import click

from .. import catalog
from ..core.errors import InputError
from ..core.fields import Batch, Portion, Probability, Seed, Temperature, Times, Tokens, shown
from ..core.outputs import LineWriter, check_file
from .options import (
    Number,
    as_json,
    engine_options,
    example,
    force_option,
    load_model,
    load_reader,
    model_options,
    parse_methods,
    progress,
    read_entries,
    read_text,
    refuse_unused,
    say,
    server_options,
    standard_output,
)

DRAWING = ("--temperature", "--min-p", "--top-p", "--top-k")
WRITING = (
    *("--prompts", "--max-new-tokens", "--greedy", *DRAWING, "--seed", "--batch-size", "--raw", "--save-pairs"),
    *("--save-traces", "--server", "--server-model", "--tokenizer", "--chunk", "--api-key"),
)


@click.command(
    epilog=example('tokenry decode --method antislop -o phrases=slop.txt "Write a story about a lighthouse"')
)
@click.argument("prompt", required=False)
@click.option("--prompts", "prompts_path", help="Prompts, one a line or a JSON list; prints a JSON line for each.")
@click.option("--method", "slugs", multiple=True, help="A decode method; may be repeated.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--max-new-tokens", type=Number(Tokens), default=256, show_default=True)
@click.option("--greedy", is_flag=True, help="Take the most probable token instead of sampling.")
@click.option("--temperature", type=Number(Temperature, ", or use --greedy"), default=1.0, show_default=True)
@click.option("--min-p", type=Number(Probability), default=0.05, show_default=True)
@click.option("--top-p", type=Number(Portion), default=1.0, show_default=True)
@click.option("--top-k", type=Number(Times), default=0, show_default=True, help="0: no limit.")
@click.option("--seed", type=Number(Seed), default=0, show_default=True)
@click.option(
    "--batch-size", type=Number(Batch), default=16, show_default=True, help="Prompts at a time with --prompts."
)
@click.option("--raw", is_flag=True, help="Continue the prompt itself, without the chat template.")
@click.option("--file", "place", metavar="FILE:LINE:COLUMN", help="Complete code there, with a method that can.")
@click.option("--lsp", is_flag=True, help="Complete code for an editor, as a language server on standard input.")
@click.option("--save-pairs", help="Write the rewinds as preference pairs (JSON lines).")
@click.option("--save-traces", help="Write what the method's training reads (safetensors), and no texts.")
@force_option
@server_options
@engine_options
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
    place: str | None,
    lsp: bool,
    save_pairs: str | None,
    save_traces: str | None,
    force: bool,
    server: str | None,
    server_model: str | None,
    tokenizer: str | None,
    chunk: int | None,
    api_key: str | None,
    engine: str | None,
    context: int | None,
    threads: int | None,
    model_name: str,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
    json_output: bool,
) -> None:
    """Generate with decode methods; one prompt streams as it goes. PROMPT '-' reads standard input."""
    methods = parse_methods(slugs, options, "decode", *([tracer_of] if save_traces else []))
    if place is not None or lsp:
        refuse_unused(WRITING, "with --lsp" if lsp else "with --file")
        runs_on = {"engine": engine, "context": context, "threads": threads}
        opening = partial(load_model, model_name, dtype, device, trust_remote_code, **runs_on)
        complete_code(methods, opening, None if lsp else place, json_output)
        return
    prompts = read_prompts(prompt, prompts_path)
    if greedy:
        refuse_unused(DRAWING, "with --greedy")
    if prompts_path is None:
        refuse_unused(("--batch-size",), "without --prompts")
    sampling = sampling_options(greedy, temperature, min_p, top_p, top_k)
    if save_traces:
        refuse_unused((*DRAWING, "--seed", "--save-pairs"), "with --save-traces")
        if len(methods) != 1:
            raise InputError(f"--save-traces is for one method, here are {len(methods)}; give {tracing()}")
    for path in filter(None, (save_pairs, save_traces)):
        check_file(path, force)
    settings = {"methods": methods, "chat": not raw, "max_new_tokens": max_new_tokens, **sampling}
    for method in methods:
        if method.caution:
            click.echo(f"{method.slug}: {method.caution}", err=True)
    if server is None:
        refuse_unused(("--server-model", "--tokenizer", "--chunk", "--api-key"), "without --server")
        runs_on = {"engine": engine, "context": context, "threads": threads}
        loaded = load_model(model_name, dtype, device, trust_remote_code, **runs_on)
        if save_traces:
            batches = [prompts[start : start + batch_size] for start in range(0, len(prompts), batch_size)]
            summary = trace(loaded, methods[0], batches, save_traces, max_new_tokens=max_new_tokens, chat=not raw)
            as_json(summary) if json_output else show_traces(methods[0], summary, model_name)
            return
        writing = here(loaded)
    else:
        unused = ("--dtype", "--device", "--engine", "--context", "--threads", "--save-traces")
        refuse_unused(unused, "with --server")
        reader = load_reader(tokenizer or model_name, trust_remote_code)
        writing = elsewhere(server, server_model, api_key, reader, chunk)
    with writing as write, LineWriter(save_pairs) if save_pairs else nullcontext() as pairs:
        if prompts_path:
            generate_many(write, prompts, settings, seed, batch_size, pairs)
        else:
            generate_one(write, prompts[0], settings, seed, pairs, json_output)


class Write(NamedTuple):
    """What continues prompts, as `tokenry.generate` does behind its model and tokenizer, and the tokenizer."""

    generate: Callable[..., Any]
    tokenizer: Any


@contextmanager
def here(loaded: Any) -> Iterator[Write]:
    """A model of this process writes."""
    from ..decode import generate

    yield Write(partial(generate, *loaded), loaded.tokenizer)


@contextmanager
def elsewhere(url: str, model: str | None, api_key: str | None, tokenizer: Any, chunk: int | None) -> Iterator[Write]:
    """Another server writes."""
    from ..decode import RemoteServer, remote

    with RemoteServer(url, model, api_key) as server:
        yield Write(partial(remote, server, tokenizer, chunk=chunk), tokenizer)


def complete_code(methods: list[Any], opening: Callable[[], Any], place: str | None, json_output: bool) -> None:
    """Print what may stand at a place of a file; or, without one, complete for an editor until it says goodbye."""
    from ..decode import CompletionMethod, offset_of

    if len(methods) != 1 or not isinstance(methods[0], CompletionMethod):
        able = [entry.slug for entry in catalog.by_stage("decode") if issubclass(entry.load(), CompletionMethod)]
        raise InputError(f"--file and --lsp are for one method that completes code; give --method {' or '.join(able)}")
    if place is None:
        from ..serve import language_server

        language_server(methods[0], opening).start_io(stdout=cast(Any, standard_output()).buffer)
        return
    path, line, column = parse_place(place)
    source = read_text(path, "source file")
    offset = offset_of(source, line, column, repr(path))
    model, reader = opening()
    found = methods[0].complete(model, reader, source, offset, path)
    if json_output:
        as_json({"file": path, "line": line, "column": column, "completions": [vars(one) for one in found]})
        return
    for rank, one in enumerate(found, 1):
        where = f"re-ranked, {one.scope}" if one.source == "re-ranked" else one.source
        say(f"{rank:>2}  {one.score:8.4f}  {one.text}  ({one.kind}; {where})")
    if not found:
        click.echo("nothing is completed here, in a string or comment", err=True)


def parse_place(place: str) -> tuple[str, int, int]:
    """FILE:LINE:COLUMN, counted from 1."""
    path, *numbers = place.rsplit(":", 2)
    if not path or len(numbers) != 2 or not all(n.isascii() and n.isdigit() and len(n) < 10 for n in numbers):
        raise InputError(f"--file {shown(place)} is not FILE:LINE:COLUMN; give a place such as x.py:12:5")
    return path, int(numbers[0]), int(numbers[1])


def read_prompts(prompt: str | None, path: str | None) -> list[str]:
    if (prompt is None) == (path is None):
        raise InputError("give one PROMPT, or a file of them with --prompts")
    if path is not None:
        prompts = [prompt for prompt in read_entries(path, "prompts", "write one a line") if prompt.strip()]
        if not prompts:
            raise InputError(f"the file {path!r} has no prompts; write one a line")
        return prompts
    text = read_text("-", "prompt") if prompt == "-" else cast(str, prompt)
    if not text.strip():
        raise InputError("the prompt is empty; give some text to continue")
    return [text]


def generate_one(
    write: Write, prompt: str, settings: dict[str, Any], seed: int, pairs: LineWriter | None, json_output: bool
) -> None:
    """Stream one text, or print it with its repairs as JSON."""
    streamers = [] if json_output else [screen(write.tokenizer)]
    output = write.generate(prompt, streamers=streamers, seed=seed, **settings)
    if pairs:
        pairs.add(output.pairs)
    stats = output.stats
    if json_output:
        events = [{k: v for k, v in vars(e).items() if k != "context_ids"} for e in output.events]
        calls = {"forward_calls": output.forward_calls, "tokens_processed": output.tokens_processed}
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
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            say(text, end=stream_end)

        def end(self) -> None:
            if not self.next_tokens_are_prompt:
                super().end()

    return Screen(tokenizer, skip_prompt=True, skip_special_tokens=True)


def generate_many(
    write: Write, prompts: list[str], settings: dict[str, Any], seed: int, size: int, pairs: LineWriter | None
) -> None:
    """A JSON line for each prompt as its batch is done; the seed of a batch is `seed` + its first prompt's number."""
    with progress("decode", len(prompts)) as update:
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            output = write.generate(batch, seed=seed + start, **settings)
            if pairs:
                pairs.add(output.pairs)
            for b, (prompt, text) in enumerate(zip(batch, output.texts)):
                say(json.dumps({"prompt": prompt, "text": text, **strategy(output, b)}, ensure_ascii=False))
            update(advance=len(batch))


def tracer_of(method: Any) -> Any:
    """What collects the traces that the training of a method (a class) reads."""
    if method.tracer is None:
        raise InputError(f"no training reads traces of {method.slug}; give {tracing()}")
    return method.tracer


def tracing() -> str:
    """The methods whose training reads traces, as they are given."""
    return " or ".join(f"--method {entry.slug}" for entry in catalog.by_stage("decode") if entry.load().tracer)


def trace(loaded: Any, tracer: Any, batches: list[list[str]], path: str, **settings: Any) -> dict[str, Any]:
    """Write the traces of all prompts, and say how many there are."""
    from ..learned.filter_traces import TraceWriter

    count = 0
    with TraceWriter(path, loaded.model) as writer, progress("trace", sum(map(len, batches))) as update:
        for batch in batches:
            traces = tracer.collect(*loaded, batch, **settings)
            writer.add(traces)
            count += len(traces.conf)
            update(completed=writer.prompts)
    return {"prompts": writer.prompts, "traces": count, "output": path}


def show_traces(tracer: Any, summary: dict[str, Any], model: str) -> None:
    command = f"tokenry train --method {tracer.slug} --model {model} --data {summary['output']} --output FOLDER"
    say(f"{summary['traces']} traces of {summary['prompts']} prompts")
    say(f"saved: {summary['output']}; try `{command}`")


def strategy(output: Any, row: int) -> dict[str, str]:
    """How a row was answered, where a method has chosen that."""
    return {"strategy": output.strategy[row]} if output.strategy else {}


def sampling_options(greedy: bool, temperature: float, min_p: float, top_p: float, top_k: int) -> dict[str, Any]:
    """Keyword arguments of `generate`."""
    if greedy:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "min_p": min_p, "top_p": top_p, "top_k": top_k}
