"""compare: measure a method against the plain model and its controls."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from .. import catalog
from ..core.errors import InputError
from ..core.fields import Count, Seed, check, shown
from ..core.outputs import check_file, write_text
from .options import Number, as_json, console, example, force_option, load_model, model_options, parse_methods, progress


@click.command(epilog=example("tokenry compare antislop --samples 64 --report report.html --record"))
@click.argument("name")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--samples", type=Number(Count), help="How many samples; default: enough for the claim.")
@click.option("--seeds", help="Seeds, separated by commas.")
@click.option("--report", "report_path", help="Write a self-contained HTML report.")
@click.option("--picture", help="Write the table as an SVG picture.")
@click.option("--record", is_flag=True, help="Write the evidence entry docs/evidence/NAME.json.")
@click.option(
    "--store", "store_path", default="runs/tokenry.sqlite", show_default=True, help="Where outcomes are kept."
)
@click.option("--resume", is_flag=True, help="Go on with the latest run of the same comparison and model.")
@force_option
@model_options
def compare(
    name: str,
    options: tuple[str, ...],
    samples: int | None,
    seeds: str | None,
    report_path: str | None,
    picture: str | None,
    record: bool,
    store_path: str,
    resume: bool,
    force: bool,
    model_name: str,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
    json_output: bool,
) -> None:
    """Measure a method against the plain model and against the controls that could fool it."""
    entry, module = catalog.experiment(name)
    method = parse_methods([entry.slug], options, entry.stage)[0] if options else None  # else the experiment's own
    seed_list = parse_seeds(seeds)
    evidence_path = Path("docs/evidence") / f"{name}.json"
    if record:
        try:
            evidence_path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{str(evidence_path.parent)!r} cannot be made ({error.strerror})") from None
        check_file(evidence_path, force=True)
    for path in (report_path, picture):
        if path:
            check_file(path, force)
    from ..measure.compare import made_of
    from ..measure.store import RunStore

    with RunStore(store_path) as store:
        model, tokenizer = load_model(model_name, dtype, device, trust_remote_code)
        # Before anything is built on the model: an adapter adds weights to it.
        about = {"model": model_name, "dtype": str(model.dtype), **made_of(model, tokenizer)}
        build = importlib.import_module(module).build
        experiment = build(model, tokenizer, samples=samples, seeds=seed_list, method=method)
        comparison = run_compare(experiment, store, about, resume)
    findings = experiment.judge(comparison)
    verdict = experiment.verdict(findings)
    command = rerun_command(name, options, samples, seeds, model_name, dtype, trust_remote_code)
    outputs = (report_path, picture, evidence_path if record else None)
    publish(comparison, findings, verdict, model_name, command, *outputs)
    if json_output:
        from ..measure.ledger import evidence

        as_json(evidence(comparison, findings, verdict, model=model_name, command=command))


def parse_seeds(seeds: str | None) -> list[int] | None:
    if seeds is None:
        return None
    try:
        found = [int(s) for s in seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds {shown(seeds)} is not a list of whole numbers; write for example 0,1,2") from None
    for seed in found:
        check("a seed of --seeds", seed, Seed)
    if len(set(found)) < len(found):
        raise InputError(f"--seeds {shown(seeds)} names one of them twice; give different ones")
    return found


def rerun_command(
    name: str,
    options: Sequence[str],
    samples: int | None,
    seeds: str | None,
    model: str,
    dtype: str | None,
    trust_remote_code: bool = False,
) -> str:
    """The command that measures the same again, without where its outputs went."""
    import shlex

    parts = ["tokenry", "compare", name]
    for option, value in (("samples", samples), ("seeds", seeds), ("dtype", dtype)):
        parts += [f"--{option}", str(value)] if value is not None else []
    parts += ["--model", model] if model != "smollm2" else []
    parts += ["--trust-remote-code"] if trust_remote_code else []
    return shlex.join([*parts, *(word for pair in options for word in ("-o", pair))])


def run_compare(experiment: Any, store: Any, about: dict[str, Any], resume: bool) -> Any:
    """Run with a progress bar on standard error; Ctrl-C keeps what was measured."""
    from ..measure.compare import Interrupted, compare

    try:
        with progress(experiment.slug, None) as update:
            return compare(
                experiment,
                store,
                about=about,
                resume=resume,
                progress=lambda done, total, what: update(completed=done, total=total, description=what),
            )
    except Interrupted as error:
        click.echo(f"{error}; they are kept, and --resume goes on from there", err=True)
        sys.exit(130)


def publish(
    comparison: Any,
    findings: Sequence[Any],
    verdict: str,
    model: str,
    command: str,
    report_path: str | None,
    picture: str | None,
    evidence_path: Path | None,
) -> None:
    """Table on standard error (standard output is for --json), report, picture and evidence entry."""
    from ..measure import report
    from ..measure.ledger import evidence, versions

    screen = console(stderr=True)
    print_result(screen, comparison, findings, verdict)
    text = ", ".join(f"{k} {v}" for k, v in versions().items())
    if report_path:
        html = report.render(comparison, findings, verdict, model=model, command=command, versions=text)
        write_text(report_path, html)
        screen.print(f"report: {report_path}")
    if picture:
        write_text(picture, draw(comparison, findings, verdict))
    if evidence_path:
        entry = evidence(comparison, findings, verdict, model=model, command=command)
        write_text(evidence_path, json.dumps(entry, ensure_ascii=False, indent=1) + "\n")
        screen.print(f"evidence: {evidence_path}")


def draw(comparison: Any, findings: Sequence[Any], verdict: str) -> str:
    """The result as an SVG text that needs no network: rich's web fonts are left out, and its comment is ours."""
    import io
    import re

    canvas = console(record=True, width=110, file=io.StringIO())
    print_result(canvas, comparison, findings, verdict)
    svg = canvas.export_svg(title=f"tokenry compare {comparison.experiment.slug}")
    svg = re.sub(r"<!--.*?-->", "<!-- Generated by tokenry -->", svg, count=1)
    return re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL)


def print_result(screen: Any, comparison: Any, findings: Sequence[Any], verdict: str) -> None:
    from rich.text import Text

    from ..measure import report

    for table in report.tables(comparison):
        screen.print(table)
    for finding in findings:
        answer = ("yes", "green") if finding.holds else ("no ", "red")
        screen.print(Text.assemble(answer, f" {finding.statement}"))
        screen.print(f"    {finding.numbers}", style="dim")
    screen.print(Text.assemble("verdict: ", (verdict, "bold")))
