"""zoo: the small models that recipes build."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from ..core.fields import Seed
from .options import Number, as_json, example, force_option, progress, quiet, say


@click.group(epilog=example("tokenry zoo build reasoner"))
def zoo() -> None:
    """Small real models, trained by recipes from a seed; `--model zoo/NAME` uses one."""


@zoo.command("list", epilog=example("tokenry zoo list --json"))
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
def list_recipes(json_output: bool) -> None:
    """List the recipes, and which models are there."""
    from ..zoo.recipes import RECIPES, record_of

    if json_output:
        as_json([about(recipe) for recipe in RECIPES])
        return
    width = max(len(recipe.name) for recipe in RECIPES)
    for recipe in RECIPES:
        there = "built" if record_of(recipe.name) else f"{recipe.minutes} min"
        say(f"zoo/{recipe.name:<{width}}  {recipe.size:5.2f} M  {there:>6}  {recipe.task}")


@zoo.command(epilog=example("tokenry zoo show reasoner"))
@click.argument("name")
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
def show(name: str, json_output: bool) -> None:
    """Show what a model is trained on, what it must reach, and what it has reached."""
    from ..zoo.recipes import find_recipe

    found = about(find_recipe(name))
    if json_output:
        as_json(found)
        return
    record = found["record"] or {"measures": {}}
    say(f"zoo/{found['name']}: {found['task']}\n\nLearns from: {found['data']}")
    say(f"Size: {found['size']} million parameters; about {found['minutes']} minutes on two cores")
    for measure, (low, high) in found["targets"].items():
        value = record["measures"].get(measure)
        say(f"  {measure:<16} {'not built' if value is None else value:>9}   must be {low} to {high}")


@zoo.command(epilog=example("tokenry zoo build reasoner --output my-reasoner"))
@click.argument("name")
@click.option("--output", help="Folder; default: where --model zoo/NAME finds it.")
@click.option("--seed", type=Number(Seed), default=0, show_default=True)
@force_option
@click.option("--json", "json_output", is_flag=True, help="Print JSON.")
def build(name: str, output: str | None, seed: int, force: bool, json_output: bool) -> None:
    """Train a model from its recipe, check what it reaches, and save it."""
    from ..zoo.building import build
    from ..zoo.recipes import find_recipe

    quiet()
    recipe = find_recipe(name)
    with progress(f"zoo/{recipe.name}", None) as update:
        folder = build(
            name,
            output,
            seed,
            lambda done, total, *loss: update(completed=done, total=total, description=f"loss {loss[0]:.3f}"),
            force,
        )
    if json_output:
        as_json({**about(recipe), "folder": str(folder)})
    else:
        say(f"saved: {folder}")


def about(recipe: Any) -> dict[str, Any]:
    """A recipe and the record of its model, as JSON values."""
    from ..zoo.recipes import record_of

    fields = {name: value for name, value in asdict(recipe).items() if name != "module"}
    return {**fields, "record": record_of(recipe.name)}
