"""compare: measure a method against the plain model and its controls."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from .. import catalog
from ..core.errors import InputError
from ..core.fields import Count, Seed, check, shown
from ..core.outputs import check_file, write_text
from .options import (
    Number,
    as_json,
    console,
    example,
    force_option,
    model_options,
    parse_methods,
    progress,
    quiet,
    refuse_unused,
)

EVIDENCE = Path("docs/evidence")
AT_ONCE = 2  # experiments of --all that run side by side, one thread each


@click.command(epilog=example("tokenry compare antislop --samples 64 --report report.html --record"))
@click.argument("name", required=False)
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--samples", type=Number(Count), help="How many samples; default: enough for the claim.")
@click.option("--seeds", help="Seeds, separated by commas.")
@click.option("--all", "every", is_flag=True, help="All experiments, each on its own model, in one table.")
@click.option("--quick", is_flag=True, help="The smallest size that runs everything; it decides little.")
@click.option("--report", "report_path", help="Write a self-contained HTML report.")
@click.option("--picture", help="Write the table as an SVG picture.")
@click.option("--record", is_flag=True, help="Write the evidence entry docs/evidence/NAME.json, and its report.")
@click.option(
    "--store", "store_path", default="runs/tokenry.sqlite", show_default=True, help="Where outcomes are kept."
)
@click.option("--resume", is_flag=True, help="Go on with the latest run of the same comparison and model.")
@click.option("--ray", metavar="ADDRESS", help="Measure on Ray: the address of a cluster, or `local`; without costs.")
@force_option
@partial(model_options, model=None)
def compare(name: str | None, every: bool, **given: Any) -> None:
    """Measure a method against the plain model and against the controls that could fool it."""
    if every:
        if name:
            raise InputError(f"--all runs every experiment; leave out {name!r}")
        alone = ["-o", "--samples", "--report", "--picture", "--ray", "--model"]
        refuse_unused(alone, "with --all, where each experiment has its own")
        compare_all(given)
    elif name is None:
        raise InputError("say what to compare, for example `tokenry compare antislop`, or --all")
    else:
        compare_one(name, **given)


def compare_one(
    name: str,
    options: tuple[str, ...],
    samples: int | None,
    seeds: str | None,
    quick: bool,
    report_path: str | None,
    picture: str | None,
    record: bool,
    store_path: str,
    resume: bool,
    ray: str | None,
    force: bool,
    model_name: str | None,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
    json_output: bool,
) -> None:
    """One experiment: build, run, judge, write."""
    entry, module = catalog.experiment(name)
    method = parse_methods([entry.slug], options, entry.stage)[0] if options else None  # else the experiment's own
    seed_list = parse_seeds(seeds)
    if quick and record:
        raise InputError("a quick run decides nothing; leave out --quick or --record")
    outputs = Outputs(report_path, picture, EVIDENCE / f"{name}.json" if record else None)
    outputs.check(force)
    from ..measure.spec import Spec
    from ..measure.store import RunStore

    spec = Spec(module, model_name, method, samples, seed_list, quick, dtype, device, trust_remote_code)
    limit = spec.declared.limit
    if record and limit and (samples or 0) > limit:
        raise InputError(f"--samples {samples} is not recorded: {name} ends at {limit}, fixed beforehand")
    quiet()
    measuring = workers(ray, spec)
    with RunStore(store_path) as store:
        experiment, about = spec.build()
        with measuring as runner:
            comparison = run_compare(experiment, store, about, resume, runner)
    used = spec.model_name
    other = used if used != spec.declared.model else None
    command = rerun_command(name, options, samples, seeds, other, dtype, trust_remote_code, quick)
    entry = publish(comparison, experiment.findings(comparison), used, command, outputs)
    if json_output:
        as_json(entry)


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
    model: str | None,
    dtype: str | None,
    trust_remote_code: bool = False,
    quick: bool = False,
) -> str:
    """The command that measures the same again, without where its outputs went. No model: the experiment's own."""
    parts = ["tokenry", "compare", name]
    for option, value in (("samples", samples), ("seeds", seeds), ("dtype", dtype), ("model", model)):
        parts += [f"--{option}", str(value)] if value is not None else []
    parts += ["--trust-remote-code"] if trust_remote_code else []
    parts += ["--quick"] if quick else []
    return shlex.join([*parts, *(word for pair in options for word in ("-o", pair))])


def workers(address: str | None, spec: Any) -> AbstractContextManager[Any]:
    """Who measures: this process (None), or Ray."""
    if address is None:
        return nullcontext()
    from ..measure.ray_workers import RayWorkers

    return RayWorkers(address, spec)


def run_compare(experiment: Any, store: Any, about: dict[str, Any], resume: bool, runner: Any = None) -> Any:
    """Run with a progress bar on standard error; Ctrl-C keeps what was measured."""
    from ..measure.compare import Interrupted, compare

    try:
        with progress(experiment.slug, None) as update:
            return compare(
                experiment,
                store,
                about=about,
                resume=resume,
                progress=lambda done, total, *what: update(completed=done, total=total, description=what[0]),
                runner=runner,
            )
    except Interrupted as error:
        click.echo(f"{error}; they are kept, and --resume goes on from there", err=True)
        sys.exit(130)


# --- what is written -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outputs:
    """Where a comparison goes, beside the terminal."""

    report: str | None
    picture: str | None
    evidence: Path | None

    @property
    def reports(self) -> list[str]:
        """That of the command, and that beside the evidence entry."""
        kept = [str(self.evidence.with_suffix(".html"))] if self.evidence else []
        return [*([self.report] if self.report else []), *kept]

    def check(self, force: bool) -> None:
        """Refuse what cannot be written, before anything is measured."""
        if self.evidence:
            try:
                self.evidence.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"{str(self.evidence.parent)!r} cannot be made ({error.strerror})") from None
            check_file(self.evidence, force=True)
            check_file(self.evidence.with_suffix(".html"), force=True)
        for path in (self.report, self.picture):
            if path:
                check_file(path, force)


def publish(comparison: Any, findings: Sequence[Any], model: str, command: str, outputs: Outputs) -> dict[str, Any]:
    """Table on standard error (standard output is for --json), report, picture; the evidence entry is returned."""
    from ..measure import report
    from ..measure.ledger import evidence, versions

    screen = console(stderr=True)
    entry = evidence(comparison, findings, model=model, command=command)
    print_result(screen, comparison, findings, entry["verdict"])
    if "costs" in entry:
        screen.print(entry["costs"])
    if outputs.reports:
        text = ", ".join(f"{k} {v}" for k, v in versions().items())
        html = report.render(comparison, findings, entry["verdict"], model=model, command=command, versions=text)
        for path in outputs.reports:
            write_text(path, html)
            screen.print(f"report: {path}")
    if outputs.picture:
        write_text(outputs.picture, draw(comparison, findings, entry["verdict"]))
    if outputs.evidence:
        write_text(outputs.evidence, json.dumps(entry, ensure_ascii=False, indent=1) + "\n")
        screen.print(f"evidence: {outputs.evidence}")
    return entry


def draw(comparison: Any, findings: Sequence[Any], verdict: str) -> str:
    """The result as an SVG text that needs no network: rich's web fonts are left out, and its comment is ours."""
    import io
    import re

    canvas = console(record=True, width=110, file=io.StringIO())
    print_result(canvas, comparison, findings, verdict)
    svg = canvas.export_svg(title=f"tokenry compare {comparison.experiment.slug}")
    svg = re.sub(r"<!--.*?-->", "<!-- Generated by tokenry -->", svg, count=1)
    return re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL)


COLORS = {"holds": "green", "fails": "red", "undecided": "yellow", "described": "dim"}


def print_result(screen: Any, comparison: Any, findings: Sequence[Any], verdict: str) -> None:
    from rich.text import Text

    from ..measure import report

    for table in report.tables(comparison):
        screen.print(table)
    for finding in findings:
        screen.print(Text.assemble((f"{finding.outcome:9}", COLORS[finding.outcome]), f" {finding.statement}"))
        screen.print(f"    {finding.numbers}", style="dim")
    screen.print(Text.assemble("verdict: ", (verdict, "bold")))


# --- all experiments -----------------------------------------------------------------------------------------------


def compare_all(given: dict[str, Any]) -> None:
    """Every experiment in a process of its own, so that one that fails, or fills the memory, leaves the others alone.

    The exit code is 1 if one has failed.
    """
    from rich.table import Table

    names, rows = catalog.experiments(), {}
    with progress("all experiments", len(names)) as update, ThreadPoolExecutor(AT_ONCE) as pool:
        running = {pool.submit(run_alone, name, given): name for name in names}
        try:
            for future in as_completed(running):
                rows[running[future]] = future.result()
                update(advance=1, description=running[future])
        except KeyboardInterrupt:  # it has reached those that run, too
            pool.shutdown(cancel_futures=True)
            click.echo(
                f"interrupted after {len(rows)} of {len(names)} experiments; --resume goes on from there", err=True
            )
            sys.exit(130)
    table = Table("experiment", "on", "verdict", "measured", box=None, pad_edge=False)
    table.columns[0].min_width = max(map(len, names))
    for name in names:
        table.add_row(*row_of(name, rows[name]))
    console(stderr=True).print(table)
    if given["json_output"]:
        as_json([rows[name] for name in names])
    failed = [name for name in names if "error" in rows[name]]
    if failed:
        click.echo(f"{len(failed)} of {len(names)} failed: {', '.join(failed)}", err=True)
        sys.exit(1)


def run_alone(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The evidence entry of an experiment, or {"slug", "error"}: the last line that it has said."""
    command = [sys.executable, "-m", "tokenry", "compare", name, "--json", "--store", given["store_path"]]
    for flag in ("quick", "resume", "record", "force", "trust_remote_code"):
        command += [f"--{flag.replace('_', '-')}"] if given[flag] else []
    for option in ("seeds", "dtype", "device"):
        command += [f"--{option}", given[option]] if given[option] else []
    alone = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=alone, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return json.loads(done.stdout)
    said = [line for line in done.stderr.splitlines() if line.strip()] or [f"ended with {done.returncode}"]
    return {"slug": name, "error": said[-1]}


def row_of(name: str, entry: dict[str, Any]) -> tuple[str, str, str, str]:
    from ..measure.ledger import measured, measured_on

    if "error" in entry:
        return name, "", "failed", entry["error"]
    return name, measured_on(entry), entry["verdict"], measured(entry)
