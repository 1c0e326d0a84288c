"""What the verbs share: options, methods from the command line, models, files."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO, get_args

import click

from .. import catalog
from ..core.errors import InputError
from ..core.fields import Chunk, Count, allowed, fits, shown
from ..core.files import as_text, entries_of, explained


class _Said(logging.Handler):
    """Shows on standard error what reading a file has found."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage(), err=True)


SAID = _Said()


def example(text: str) -> str:
    """An epilog that click does not reflow."""
    return "\b\nExample:\n  " + text


class Number(click.ParamType):
    """A number with the bounds that it is declared with, see `tokenry.core.fields`."""

    def __init__(self, declared: Any, or_else: str = "") -> None:
        self.declared, self.or_else = declared, or_else
        self.name = "integer" if get_args(declared)[0] is int else "float"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        try:
            number = get_args(self.declared)[0](value)
        except ValueError:
            number = None
        if not fits(number, self.declared):
            given = shown(value) if number is None or len(value) > 20 else number
            raise InputError(f"{param.opts[0]} {given} is not allowed; give {allowed(self.declared)}{self.or_else}")
        return number


_OURS: list[TextIO] = []  # standard output, while a command runs


@contextmanager
def standard_output_is_ours() -> Iterator[None]:
    """Meanwhile standard output takes what is said here alone; what libraries print goes to standard error."""
    _OURS.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _OURS.pop()


def standard_output() -> TextIO:
    """Where a command says what it was asked for."""
    return _OURS[-1] if _OURS else sys.stdout


def say(text: str = "", end: bool = True) -> None:
    """A line of what was asked for, or without its end a piece of one."""
    click.echo(text, file=standard_output(), nl=end)


def as_json(value: Any) -> None:
    say(json.dumps(value, ensure_ascii=False, indent=2))


def trust_option(command: Any) -> Any:
    """--trust-remote-code, for verbs that load a model or a tokenizer."""
    text = "Run Python code that comes with the model or tokenizer."
    return click.option("--trust-remote-code", is_flag=True, help=text)(command)


def model_options(command: Any, model: str | None = "smollm2") -> Any:
    """--model, --dtype, --device, --trust-remote-code and --json. Without a default model the verb knows its own."""
    default = model or "that of the experiment"
    for option in (
        click.option("--json", "json_output", is_flag=True, help="Print JSON."),
        trust_option,
        click.option("--device", help="Where to run; default: cuda where there is one."),
        click.option("--dtype", help="float32, bfloat16 or float16; default: float32 on CPU."),
        click.option(
            "--model", "model_name", default=model, show_default=default, help="Name, folder, hub id or GGUF file."
        ),
    ):
        command = option(command)
    return command


def engine_options(command: Any) -> Any:
    """--engine, --context and --threads, for verbs that write with a model."""
    for option in (
        click.option("--threads", type=Number(Count), help="Of llamacpp; default: as many as torch uses."),
        click.option("--context", type=Number(Count), help="Most tokens of a text, for llamacpp."),
        click.option("--engine", help="transformers or llamacpp; default: llamacpp for a .gguf file."),
    ):
        command = option(command)
    return command


def server_options(command: Any) -> Any:
    """--server and what goes with it, for verbs that can leave the writing to another server."""
    key = "What the server wants to see; or set TOKENRY_API_KEY."
    for option in (
        click.option("--api-key", envvar="TOKENRY_API_KEY", help=key),
        click.option("--chunk", type=Number(Chunk), help="Tokens of a request; default: it adapts to what is found."),
        click.option("--tokenizer", help="Whose tokenizer the server's model has; default: that of --model."),
        click.option("--server-model", help="The model's name there; default: the first one that it lists."),
        click.option("--server", help="Let an OpenAI-compatible server write, such as http://127.0.0.1:8000."),
    ):
        command = option(command)
    return command


def force_option(command: Any) -> Any:
    """--force, for verbs that write."""
    text = "Write also where there is something that tokenry did not write."
    return click.option("--force", is_flag=True, help=text)(command)


def parse_methods(
    slugs: Sequence[str], pairs: Sequence[str], stage: str, part: Callable[[Any], Any] = lambda cls: cls
) -> list[Any]:
    """Methods with their -o options; with several methods an option is written slug.name=value.

    Args:
        part: what of a method's class the options are for; the class itself.
    """
    classes = {}
    for slug in slugs:
        entry = catalog.get(slug, stage)
        if entry.stage != stage:
            raise InputError(f"{slug} belongs to the stage {entry.stage!r}; use `tokenry {entry.stage}`")
        classes[slug] = part(entry.load())
    own: dict[str, list[str]] = {slug: [] for slug in slugs}
    for pair in pairs:
        prefix, dot, _ = pair.partition("=")[0].partition(".")
        if dot and prefix in own:
            own[prefix].append(pair.removeprefix(prefix + "."))
        elif len(own) == 1:
            own[slugs[0]].append(pair)
        else:
            raise InputError(f"say which method the option {pair!r} is for: -o SLUG.{pair}")
    return [cls.from_strings(own[slug]) for slug, cls in classes.items()]


def refuse_unused(names: Sequence[str], reason: str) -> None:
    """Refuse options that were given on the command line and would not be looked at."""
    context, typed = click.get_current_context(), click.core.ParameterSource.COMMANDLINE
    given = {o for p in context.command.params if context.get_parameter_source(p.name) is typed for o in p.opts}
    unused = [name for name in names if name in given]
    if unused:
        raise InputError(f"{', '.join(unused)} would have no effect {reason}; leave it out")


def quiet() -> None:
    """No warnings and progress bars of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def load_reader(name: str, trust_remote_code: bool) -> Any:
    """The tokenizer of what a server runs."""
    from ..models.load import load_tokenizer

    quiet()
    return load_tokenizer(name, trust_remote_code)


def load_model(
    name: str,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool = False,
    translates: bool = False,
    **opening: Any,
) -> Any:
    """Load quietly.

    Args:
        translates: whether a translation model is asked for; no other verb takes one.
        opening: what `engine_options` has read.
    """
    from ..models.load import load

    quiet()
    loaded = load(name, dtype, device, trust_remote_code, **opening)
    if loaded.kind == "seq2seq" and not translates:
        raise InputError(
            f"the model {name!r} translates: it has an encoder ({loaded.model.config.model_type}), which this method "
            "does not take; choose a causal one"
        )
    return loaded


def read_text(path: str, what: str) -> str:
    """The text of a file, or of standard input for '-'."""
    with explained(f"the {what} {path!r} cannot be read", "give a text file"):
        if path == "-" and sys.stdin is None:
            raise ValueError("standard input is closed")
        return as_text(sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes())


def read_entries(path: str, what: str, remedy: str) -> list[str]:
    """The entries of a user's file or of standard input, blank ones too."""
    text = read_text(path, what)
    with explained(f"the {what} {path!r} cannot be read", remedy):
        return entries_of(text)


def console(**options: Any) -> Any:
    """A rich console that takes text as it is: names and paths may hold what looks like markup or :emoji:."""
    from rich.console import Console

    where = {} if options.get("stderr") else {"file": standard_output()}
    return Console(markup=False, emoji=False, **{**where, **options})


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A bar on standard error; yields `update(advance=1)`, which also takes completed, total and description."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda **fields: bar.update(task, **fields)
