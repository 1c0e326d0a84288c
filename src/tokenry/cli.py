"""The command line: one verb per stage, and `list`, `show`, `find`, `compare`.

Nothing heavy is imported before a command needs it, so that `tokenry list` answers at once.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__, catalog
from .errors import InputError

if TYPE_CHECKING:
    from .method import Method


class Refusal(click.ClickException):
    """Bad input: one sentence, exit code 2."""

    exit_code = 2


class Commands(click.Group):
    """A group that turns InputError into a refusal."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            raise Refusal(str(error)) from None


def example(text: str) -> str:
    """An epilog that click does not reflow."""
    return "\b\nExample:\n  " + text


@click.group(cls=Commands, epilog=example("tokenry compare antislop --report report.html"))
@click.version_option(__version__)
def main() -> None:
    """Everything that happens to a token in a transformer: methods from the literature, each measured."""


# --- the catalogue -------------------------------------------------------------------------------------------------


def as_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, indent=2))


def entry_dict(entry: catalog.Entry) -> dict[str, str]:
    return {"slug": entry.slug, "stage": entry.stage, "summary": entry.summary}


def print_entries(entries: Sequence[catalog.Entry], json_output: bool) -> None:
    if json_output:
        as_json([entry_dict(e) for e in entries])
        return
    width = max((len(e.slug) for e in entries), default=0)
    for entry in entries:
        click.echo(f"{entry.slug:<{width}}  {entry.stage:<9}  {entry.summary}")


@main.command("list", epilog=example("tokenry list --stage decode"))
@click.option("--stage", help="Only the methods of one stage.")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
def list_methods(stage: str | None, json_output: bool) -> None:
    """List the methods."""
    print_entries(catalog.by_stage(stage), json_output)


@main.command(epilog=example("tokenry find 'shorter kv cache'"))
@click.argument("question")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
def find(question: str, json_output: bool) -> None:
    """Find methods by what they do."""
    found = catalog.find(question)
    if not found and not json_output:
        raise InputError(f"no method matches {question!r}; see `tokenry list`")
    print_entries(found, json_output)


@main.command(epilog=example("tokenry show antislop"))
@click.argument("slug")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
def show(slug: str, json_output: bool) -> None:
    """Show what a method does, its paper and its options."""
    entry = catalog.get(slug)
    method = entry.load()
    if json_output:
        about = {"title": method.title, "paper": method.paper, "claim": method.claim}
        as_json({**entry_dict(entry), **about, "options": [o._asdict() for o in method.options()]})
        return
    click.echo(f"{method.title} ({entry.stage}): {entry.summary}\n\nPaper:  {method.paper}\nClaim:  {method.claim}\n")
    click.echo("Options (-o name=value):")
    for option in method.options():
        allowed = f", {option.range}" if option.range else ""
        click.echo(f"  {option.name} = {option.default}\n      {option.description} ({option.type}{allowed})")


# --- shared options ------------------------------------------------------------------------------------------------


def model_options(command: Any) -> Any:
    """--model, --dtype, --device and --json."""
    for option in (
        click.option("--json", "json_output", is_flag=True, help="Print JSON."),
        click.option("--device", help="Where to run; default: cuda where there is one."),
        click.option("--dtype", help="float32, bfloat16 or float16; default: float32 on CPU."),
        click.option("--model", "model_name", default="smollm2", show_default=True, help="Name, folder or hub id."),
    ):
        command = option(command)
    return command


def parse_methods(slugs: Sequence[str], pairs: Sequence[str], stage: str) -> list[Method]:
    """Methods with their -o options; with several methods an option is written slug.name=value."""
    classes = {}
    for slug in slugs:
        entry = catalog.get(slug)
        if entry.stage != stage:
            raise InputError(f"{slug} belongs to the stage {entry.stage!r}; use `tokenry {entry.stage}`")
        classes[slug] = entry.load()
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


def load_model(name: str, dtype: str | None, device: str | None) -> Any:
    """Load quietly."""
    from transformers.utils import logging

    from .models import load

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return load(name, dtype, device)


def read_text(path: str, what: str) -> str:
    """The text of a file, or of standard input for '-'."""
    try:
        return sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise InputError(f"the {what} {path!r} cannot be read ({reason}); give a text file") from None


# --- decode and select ---------------------------------------------------------------------------------------------


@main.command(epilog=example('tokenry decode --method antislop -o phrases=slop.txt "Write a story about a lighthouse"'))
@click.argument("prompt")
@click.option("--method", "slugs", multiple=True, help="A decode method; may be repeated.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--max-new-tokens", default=256, show_default=True)
@click.option("--greedy", is_flag=True, help="Take the most probable token instead of sampling.")
@click.option("--temperature", default=1.0, show_default=True)
@click.option("--min-p", default=0.05, show_default=True)
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--top-k", default=0, show_default=True, help="0: no limit.")
@click.option("--seed", default=0, show_default=True)
@click.option("--raw", is_flag=True, help="Continue the prompt itself, without the chat template.")
@click.option("--save-pairs", help="Write the rewinds as preference pairs (JSON lines).")
@model_options
def decode(
    prompt: str,
    slugs: tuple[str, ...],
    options: tuple[str, ...],
    max_new_tokens: int,
    greedy: bool,
    temperature: float,
    min_p: float,
    top_p: float,
    top_k: int,
    seed: int,
    raw: bool,
    save_pairs: str | None,
    model_name: str,
    dtype: str | None,
    device: str | None,
    json_output: bool,
) -> None:
    """Generate with decode methods; streams as it goes. PROMPT '-' reads standard input."""
    methods = parse_methods(slugs, options, "decode")
    if prompt == "-":
        prompt = read_text("-", "prompt")
    if not prompt.strip():
        raise InputError("the prompt is empty; give some text to continue")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} leaves nothing to generate; give a number >= 1")
    sampling = sampling_options(greedy, temperature, min_p, top_p, top_k)
    if save_pairs:
        check_writable(save_pairs)
    from transformers import TextStreamer

    from .decode import generate

    model, tokenizer = load_model(model_name, dtype, device)
    streamers = [] if json_output else [TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)]
    output = generate(
        model,
        tokenizer,
        prompt,
        methods=methods,
        streamers=streamers,
        seed=seed,
        chat=not raw,
        max_new_tokens=max_new_tokens,
        **sampling,
    )
    if save_pairs:
        Path(save_pairs).write_text("".join(json.dumps(pair) + "\n" for pair in output.pairs), encoding="utf-8")
    if json_output:
        events = [{k: v for k, v in vars(e).items() if k != "context_ids"} for e in output.events]
        calls = {"forward_calls": output.forward_calls, "token_forwards": output.token_forwards}
        as_json({"text": output.texts[0], "ids": output.new_ids[0], "events": events, **calls})
    elif output.events:
        click.echo(f"({len(output.events)} repairs; --json lists them)", err=True)


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


def check_writable(path: str) -> None:
    from .measure.report import check_writable

    check_writable(path)


@main.command(epilog=example('tokenry select --method compresskv -o budget=128 --context FILE "Who opened the door?"'))
@click.argument("question")
@click.option("--method", "slug", required=True, help="A select method.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--context", required=True, help="File with the long text; '-' for standard input.")
@click.option("--max-new-tokens", default=64, show_default=True)
@model_options
def select(
    question: str,
    slug: str,
    options: tuple[str, ...],
    context: str,
    max_new_tokens: int,
    model_name: str,
    dtype: str | None,
    device: str | None,
    json_output: bool,
) -> None:
    """Answer a question about a long text with a compressed cache."""
    (method,) = parse_methods([slug], options, "select")
    text = read_text(context, "context")
    if not text.strip() or not question.strip():
        raise InputError("the context or the question is empty; give some text")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} leaves nothing to generate; give a number >= 1")
    from .cache import cache_bytes
    from .decode import generate

    model, tokenizer = load_model(model_name, dtype, device)
    with method(model) as kept:
        output = generate(model, tokenizer, f"{text}\n\n{question}", max_new_tokens=max_new_tokens)
    counts = kept.trace.counts()
    if json_output:
        size = {"prompt_tokens": len(output.prompt_ids[0]), "cache_bytes": cache_bytes(output.past_key_values)}
        as_json({"text": output.texts[0], "kept": list(counts.values()), **size})
    else:
        click.echo(output.texts[0].strip())
        mean = sum(counts.values()) / len(counts)
        click.echo(f"(kept {mean:.0f} of {len(output.prompt_ids[0])} tokens per layer)", err=True)


# --- compare -------------------------------------------------------------------------------------------------------


@main.command(epilog=example("tokenry compare antislop --samples 64 --report report.html --record"))
@click.argument("slug")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--samples", type=int, help="How many samples; default: enough for the claim.")
@click.option("--seeds", help="Seeds, separated by commas.")
@click.option("--report", "report_path", help="Write a self-contained HTML report.")
@click.option("--picture", help="Write the table as an SVG picture.")
@click.option("--record", is_flag=True, help="Write the evidence entry docs/evidence/SLUG.json.")
@click.option(
    "--store", "store_path", default="runs/tokenry.sqlite", show_default=True, help="Where outcomes are kept."
)
@click.option("--resume", is_flag=True, help="Go on with the latest run of the same comparison.")
@model_options
def compare(
    slug: str,
    options: tuple[str, ...],
    samples: int | None,
    seeds: str | None,
    report_path: str | None,
    picture: str | None,
    record: bool,
    store_path: str,
    resume: bool,
    model_name: str,
    dtype: str | None,
    device: str | None,
    json_output: bool,
) -> None:
    """Measure a method against the plain model and against the controls that could fool it."""
    entry = catalog.get(slug)
    if entry.experiment is None:
        raise InputError(f"{slug} has no comparison of its own; it is a baseline of another method's")
    (method,) = parse_methods([slug], options, entry.stage)
    if samples is not None and samples < 1:
        raise InputError(f"--samples {samples} measures nothing; give a number >= 1")
    seed_list = parse_seeds(seeds)
    evidence_path = Path("docs/evidence") / f"{slug}.json"
    if record:
        try:
            evidence_path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{str(evidence_path.parent)!r} cannot be made ({error.strerror})") from None
    for path in (report_path, picture, evidence_path if record else None):
        if path:
            check_writable(path)
    from .measure.store import RunStore

    with RunStore(store_path) as store:
        model, tokenizer = load_model(model_name, dtype, device)
        build = importlib.import_module(entry.experiment).build
        experiment = build(model, tokenizer, samples=samples, seeds=seed_list, method=method if options else None)
        about = {"model": model_name, "dtype": str(model.dtype)}
        comparison = run_compare(experiment, store, about, resume)
    findings = experiment.judge(comparison)
    verdict = experiment.verdict(findings)
    command = rerun_command(slug, options, samples, seeds, model_name, dtype)
    outputs = (report_path, picture, evidence_path if record else None)
    publish(comparison, findings, verdict, model_name, command, *outputs)
    if json_output:
        from .measure.evidence import evidence

        as_json(evidence(comparison, findings, verdict, model=model_name, command=command))


def parse_seeds(seeds: str | None) -> list[int] | None:
    if seeds is None:
        return None
    try:
        return [int(s) for s in seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds {seeds!r} is not a list of whole numbers; write for example 0,1,2") from None


def rerun_command(
    slug: str, options: Sequence[str], samples: int | None, seeds: str | None, model: str, dtype: str | None
) -> str:
    """The command that measures the same again, without where its outputs went."""
    import shlex

    parts = ["tokenry", "compare", slug]
    for name, value in (("samples", samples), ("seeds", seeds), ("dtype", dtype)):
        parts += [f"--{name}", str(value)] if value is not None else []
    parts += ["--model", model] if model != "smollm2" else []
    return shlex.join([*parts, *(word for pair in options for word in ("-o", pair))])


def run_compare(experiment: Any, store: Any, about: dict[str, Any], resume: bool) -> Any:
    """Run with a progress bar on standard error; Ctrl-C keeps what was measured."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from .measure.compare import Interrupted, compare

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    try:
        with bar:
            task = bar.add_task(experiment.slug, total=None)
            return compare(
                experiment,
                store,
                about=about,
                resume=resume,
                progress=lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
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
    from rich.console import Console

    from .measure import report
    from .measure.evidence import evidence, versions

    console = Console(stderr=True)
    print_result(console, comparison, findings, verdict)
    text = ", ".join(f"{k} {v}" for k, v in versions().items())
    if report_path:
        html = report.render(comparison, findings, verdict, model=model, command=command, versions=text)
        Path(report_path).write_text(html, encoding="utf-8")
        console.print(f"report: {report_path}")
    if picture:
        Path(picture).write_text(draw(comparison, findings, verdict), encoding="utf-8")
    if evidence_path:
        entry = evidence(comparison, findings, verdict, model=model, command=command)
        evidence_path.write_text(json.dumps(entry, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        console.print(f"evidence: {evidence_path}")


def draw(comparison: Any, findings: Sequence[Any], verdict: str) -> str:
    """The result as an SVG text that needs no network: rich's web fonts are left out."""
    import io
    import re

    from rich.console import Console

    canvas = Console(record=True, width=110, file=io.StringIO())
    print_result(canvas, comparison, findings, verdict)
    svg = canvas.export_svg(title=f"tokenry compare {comparison.experiment.slug}")
    return re.sub(r"@font-face\s*\{.*?\}", "", svg, flags=re.DOTALL)


def print_result(console: Any, comparison: Any, findings: Sequence[Any], verdict: str) -> None:
    from .measure import report

    for table in report.tables(comparison):
        console.print(table)
    for finding in findings:
        answer = "[green]yes[/]" if finding.holds else "[red]no [/]"
        console.print(f"{answer} {finding.statement}", highlight=False)
        console.print(f"    {finding.numbers}", style="dim", highlight=False)
    console.print(f"verdict: [bold]{verdict}[/]")
