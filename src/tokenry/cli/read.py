"""read: what a text or a trace carries inside a model, and what a method has learned for reading it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..core.errors import InputError
from ..core.outputs import check_file, write_text
from .options import (
    as_json,
    console,
    example,
    force_option,
    load_model,
    model_options,
    parse_methods,
    progress,
    read_text,
)

if TYPE_CHECKING:
    from ..read.contract import Reading, ReadMethod


@click.command(epilog=example('tokenry read --method lm-head-neurons -o find=because "She stayed at home because"'))
@click.argument("text", required=False)
@click.option("--method", "slug", required=True, help="A read method.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--trace", "trace_path", help="Read a saved trace instead of a text.")
@click.option("--artifact", "artifact_path", help="What `tokenry fit` has saved, instead of making it anew.")
@click.option("--report", "report_path", help="Write a self-contained HTML page of what was read.")
@force_option
@model_options
def read(
    text: str | None,
    slug: str,
    options: tuple[str, ...],
    trace_path: str | None,
    artifact_path: str | None,
    report_path: str | None,
    force: bool,
    model_name: str,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
    json_output: bool,
) -> None:
    """Read a text or a trace, and ask what the method has learned of the model.

    TEXT '-' reads standard input.
    """
    (method,) = parse_methods([slug], options, "read")
    check_asked(method, text, trace_path)
    check_artifact(method, artifact_path)
    text = read_text("-", "text") if text == "-" else text
    if text is not None and not text.strip():
        raise InputError("the text is empty; give some text to read")
    if report_path:
        check_file(report_path, force)
    loaded = load_model(model_name, dtype, device, trust_remote_code)
    artifact = method.load(artifact_path, loaded) if artifact_path else made(method, loaded)
    readings = method.browse(artifact)
    if trace_path:
        from ..trace.trace import Trace

        readings.append(method.read(Trace.load(trace_path, loaded.model), artifact, loaded))
    elif text is not None:
        readings.append(method.read(text, artifact, loaded))
    if report_path:
        from ..read.pages import page

        write_text(report_path, page(readings))
    show(readings, json_output)


def check_asked(method: ReadMethod, text: str | None, trace: str | None) -> None:
    """Refuse what the method does not read, and a call that asks for nothing."""
    given = {"text": text is not None, "trace": trace is not None}
    for kind in given:
        if given[kind] and kind not in method.takes:
            raise InputError(f"{method.slug} reads no {kind}; leave it out, see `tokenry show {method.slug}`")
    if all(given.values()):
        raise InputError("there is a text and --trace; give one of them")
    of_input = set(method.input_options) & method.model_fields_set
    if of_input and not any(given.values()):
        raise InputError(f"{', '.join(sorted(of_input))} would have no effect without a text or a trace; leave it out")
    asking = [o for o in type(method).model_fields if o not in (*method.fit_options, *method.input_options)]
    if not any(given.values()) and not method.model_fields_set & {*asking}:
        ways = [{"text": "a text", "trace": "--trace"}[kind] for kind in method.takes] + [f"-o {o}" for o in asking]
        raise InputError(f"nothing was asked; give {' or '.join(ways)}")


def check_artifact(method: ReadMethod, path: str | None) -> None:
    """Refuse options that shape an artifact that is there already, and a method that cannot do without one."""
    if path is None:
        if method.learns_from:
            raise InputError(f"{method.slug} reads with what it has learned; `tokenry fit {method.slug}`, --artifact")
        return
    if method.artifact is None:
        raise InputError(f"{method.slug} has no use for --artifact; leave it out")
    shaping = [name for name in method.fit_options if name in method.model_fields_set]
    if shaping:
        raise InputError(f"{', '.join(shaping)} would have no effect with --artifact; leave it out, or fit again")


def made(method: ReadMethod, loaded: Any) -> Any:
    """The artifact of a method that learns from the model alone, with a progress bar on standard error."""
    if method.artifact is None:
        return None
    with progress(method.slug, None) as update:
        return method.fit(loaded, None, lambda done, total, *_: update(completed=done, total=total)).artifact


def show(readings: list[Reading], json_output: bool) -> None:
    if json_output:
        as_json([reading.to_json() for reading in readings])
        return
    for reading in readings:
        console().print(reading.plot())
