"""train: teach a model with token-level signal."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from ..core.errors import InputError
from ..core.fields import Share
from ..core.outputs import check_folder, write_folder
from .options import Number, as_json, example, force_option, load_model, model_options, parse_methods, progress


@click.command(epilog=example("tokenry train --method ftpo --data pairs.jsonl --output smollm2-without-slop"))
@click.option("--method", "slug", required=True, help="A train method.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--data", required=True, help="What it learns from: JSON lines of pairs or episodes, or traces.")
@click.option("--output", required=True, help="New folder for what is trained.")
@click.option(
    "--hold-out", type=Number(Share), default=0.1, show_default=True, help="Share of the data that is only measured."
)
@force_option
@model_options
def train(
    slug: str,
    options: tuple[str, ...],
    data: str,
    output: str,
    hold_out: float,
    force: bool,
    model_name: str,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
    json_output: bool,
) -> None:
    """Train on pairs, episodes or traces, and show what is measured at held-out ones before and after."""
    (method,) = parse_methods([slug], options, "train")
    if not force and Path(output).is_dir() and any(Path(output).iterdir()):
        raise InputError(f"the output {output!r} exists and is not an empty folder; give a new one, or add --force")
    check_folder(output, force)
    if not (Path(data).is_file() or (method.takes_folder and Path(data).is_dir())):
        raise InputError(f"the {method.examples} {data!r} cannot be read (no such file); give {method.data}")
    model, tokenizer = load_model(model_name, dtype, device, trust_remote_code)
    kept, held = split(method.read(data, tokenizer), hold_out)
    with progress(slug, None) as update, TemporaryDirectory() as scratch:
        trainer = method.trainer(
            model, tokenizer, kept, scratch, progress=lambda done, total, *_: update(completed=done, total=total)
        )
        before = measure(method, trainer, held or kept)
        trained = trainer.train()
    after = measure(method, trainer, held or kept)
    if int(os.environ.get("RANK", "0")):  # under torchrun the first process writes and tells
        return
    write_folder(output, lambda part: method.save(trainer, part), force)
    summary = {
        method.examples: len(kept),
        "held_out": len(held),
        "steps": trainer.state.global_step,
        "seconds": round(trained.metrics["train_runtime"], 1),
        "before": before,
        "after": after,
        "output": output,
    }
    as_json(summary) if json_output else show(method, summary, model_name)


def split(examples: list[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Training and held-out examples; they come in random order."""
    held = round(share * len(examples))
    return examples[held:], examples[:held]


def measure(method: Any, trainer: Any, examples: list[Any]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in method.score(trainer, examples).items()}


def show(method: Any, summary: dict[str, Any], model: str) -> None:
    before, after, what = summary["before"], summary["after"], method.examples
    where = "held-out" if summary["held_out"] else "training"
    click.echo(f"{summary[what]} {what}, {summary['steps']} steps, {summary['seconds']} s; at {where} {what}:")
    for name, meaning in method.measures.items():
        click.echo(f"  {meaning:<46} {before[name]:.3f} -> {after[name]:.3f}")
    command = method.next_step.format(output=summary["output"], model=model)
    click.echo(f"saved: {summary['output']}; try `{command}`")
