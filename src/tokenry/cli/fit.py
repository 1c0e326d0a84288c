"""fit: let a read method learn what it reads with."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from ..core.errors import InputError
from ..core.outputs import check_file, check_folder, write_folder
from .options import example, force_option, load_model, model_options, parse_methods, progress, read_text
from .read import show

if TYPE_CHECKING:
    from ..read.contract import ReadMethod

TASK = re.compile(r"[a-z]+:\d{1,12}")


@click.command(epilog=example("tokenry fit difficulty-probe --data arithmetic:320 --model zoo/reasoner --save probe"))
@click.argument("slug", metavar="METHOD")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--data", help="What it learns from: a file, '-' for standard input, or TASK:N for N examples of a task.")
@click.option("--save", "path", required=True, help="Where to save it; `tokenry read --artifact` takes it.")
@force_option
@model_options
def fit(
    slug: str,
    options: tuple[str, ...],
    data: str | None,
    path: str,
    force: bool,
    model_name: str,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
    json_output: bool,
) -> None:
    """Let METHOD learn from the model, and from data where it needs some, and save what it has learned."""
    (method,) = parse_methods([slug], options, "read")
    check_learns(method, data)
    check_folder(path, force) if method.saved_as == "folder" else check_file(path, force)
    examples = None if data is None else read_examples(method, data)
    loaded = load_model(model_name, dtype, device, trust_remote_code)
    with progress(slug, None) as update:
        found = method.fit(loaded, examples, lambda done, total, *_: update(completed=done, total=total))
    if method.saved_as == "folder":
        write_folder(path, found.artifact.save, force)
    else:
        found.artifact.save(path)
    click.echo(f"saved: {path}; {found.quality}", err=True)
    show(found.readings, json_output)


def check_learns(method: ReadMethod, data: str | None) -> None:
    """Refuse a method that learns nothing, options that it would not look at, and data too many or missing."""
    if method.artifact is None:
        raise InputError(f"{method.slug} learns nothing; use `tokenry read --method {method.slug}`")
    unused = sorted(method.model_fields_set - set(method.fit_options))
    if unused:
        raise InputError(f"{', '.join(unused)} would have no effect on what is learned; leave it to `tokenry read`")
    if data is None and method.learns_from:
        raise InputError(f"{method.slug} has nothing to learn from; give --data, {method.learns_from}")
    if data is not None and not method.learns_from:
        raise InputError(f"{method.slug} learns from the model alone; leave --data out")


def read_examples(method: ReadMethod, data: str) -> Any:
    """The examples of a task, or of a file."""
    return method.examples(data, None if TASK.fullmatch(data) else read_text(data, "data"))
