"""list, show, find."""

from __future__ import annotations

from collections.abc import Sequence

import click

from .. import catalog
from ..core.errors import InputError
from .options import as_json, example, say


def entry_dict(entry: catalog.Entry) -> dict[str, str]:
    return {"slug": entry.slug, "stage": entry.stage, "summary": entry.summary}


def print_entries(entries: Sequence[catalog.Entry], json_output: bool) -> None:
    if json_output:
        as_json([entry_dict(e) for e in entries])
        return
    width = max((len(e.slug) for e in entries), default=0)
    for entry in entries:
        say(f"{entry.slug:<{width}}  {entry.stage:<9}  {entry.summary}")


@click.command("list", epilog=example("tokenry list --stage decode"))
@click.option("--stage", help="Only the methods of one stage.")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
def list_methods(stage: str | None, json_output: bool) -> None:
    """List the methods."""
    print_entries(catalog.by_stage(stage), json_output)


@click.command(epilog=example("tokenry find 'shorter kv cache'"))
@click.argument("question")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
def find(question: str, json_output: bool) -> None:
    """Find methods by what they do."""
    found = catalog.find(question)
    if not found and not json_output:
        raise InputError(f"no method matches {question!r}; see `tokenry list`")
    print_entries(found, json_output)


@click.command(epilog=example("tokenry show antislop"))
@click.argument("slug")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
def show(slug: str, json_output: bool) -> None:
    """Show what a method does, its paper and its options."""
    entry = catalog.get(slug)
    method = entry.load()
    if json_output:
        about = {"title": method.title, "paper": method.paper, "claim": method.claim}
        about["published"] = method.published._asdict() if method.published else None
        options = [o._asdict() for o in method.options()]
        as_json({**entry_dict(entry), **about, "options": options, "schema": method.schema()})
        return
    say(f"{method.title} ({entry.stage}): {entry.summary}\n\nPaper:  {method.paper}\nClaim:  {method.claim}")
    if method.published:
        say(f"        {method.published}; {method.published.source}")
    say()
    if method.caution:
        say(f"Note:   {method.caution}\n")
    for name in entry.experiments:
        say(f"Measure it: tokenry compare {name}")
    say("Options (-o name=value):")
    for option in method.options():
        allowed = f", {option.range}" if option.range else ""
        say(f"  {option.name} = {option.default}\n      {option.description} ({option.type}{allowed})")
