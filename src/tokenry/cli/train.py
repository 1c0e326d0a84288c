"""train: teach a model with token-level signal."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import click

from ..core.errors import InputError
from ..core.fields import Share
from ..core.outputs import check_folder, write_folder
from .options import Number, as_json, example, force_option, load_model, model_options, parse_methods, progress, say


@click.command(epilog=example("tokenry train --method ftpo --data pairs.jsonl --output smollm2-without-slop"))
@click.option("--method", "slug", required=True, help="A train method.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option(
    "--data",
    "--project",
    "data",
    required=True,
    help="What it learns from: JSON lines of pairs or episodes, traces, or the folder of a software project.",
)
@click.option("--control", help="More of the same kind that is only measured, such as another project.")
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
    control: str | None,
    output: str,
    hold_out: float,
    force: bool,
    model_name: str,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
    json_output: bool,
) -> None:
    """Train on pairs, episodes, traces or a project, and show what is measured at held-out ones before and after.

    Where a method has several ways to train (`-o way=all` of personalized-code), each starts from the same model and
    gets a folder of its own in OUTPUT, and a table compares them.
    """
    (method,) = parse_methods([slug], options, "train")
    if not force and Path(output).is_dir() and any(Path(output).iterdir()):
        raise InputError(f"the output {output!r} exists and is not an empty folder; give a new one, or add --force")
    check_folder(output, force)
    for path in filter(None, (data, control)):
        if not (Path(path).is_file() or (method.takes_folder and Path(path).is_dir())):
            raise InputError(f"the {method.examples} {path!r} cannot be read (no such file); give {method.data}")
    variants, answers, sources = method.variants(), [], Sources(data, control, hold_out)
    for variant in variants:
        loaded = load_model(model_name, dtype, device, trust_remote_code)
        place = output if len(variants) == 1 else str(Path(output) / variant.label)
        answer = train_one(variant, loaded, sources, place, force)
        if answer is None:  # under torchrun the first process writes and tells
            continue
        answers.append(answer)
        if not json_output:
            show(variant, answer, model_name)
    if json_output and answers:
        as_json(answers[0] if len(variants) == 1 else {v.label: answer for v, answer in zip(variants, answers)})
    elif len(answers) > 1:
        say(table(method, variants, answers))


class Sources(NamedTuple):
    """What is learned from, what is only measured, and the share of the former that is, too."""

    data: str
    control: str | None
    hold_out: float


def train_one(method: Any, loaded: Any, sources: Sources, output: str, force: bool) -> dict[str, Any] | None:
    """Train, save and measure; None in all processes of several but the first."""
    model, tokenizer = loaded
    kept, held = split(method.read(sources.data, tokenizer), sources.hold_out)
    others = method.read(sources.control, tokenizer) if sources.control else []
    with progress(method.label, None) as update, TemporaryDirectory() as scratch:
        trainer = method.trainer(
            model, tokenizer, kept, scratch, progress=lambda done, total, *_: update(completed=done, total=total)
        )
        before, before_others = (measure(method, trainer, rows) for rows in (held or kept, others))
        trained = trainer.train()
    after, after_others = (measure(method, trainer, rows) for rows in (held or kept, others))
    if int(os.environ.get("RANK", "0")):
        return None
    write_folder(output, lambda part: method.save(trainer, part), force)
    return {
        method.examples: len(kept),
        "held_out": len(held),
        "steps": trainer.state.global_step,
        "seconds": round(trained.metrics["train_runtime"], 1),
        "before": before,
        "after": after,
        **({"control": {"before": before_others, "after": after_others}} if others else {}),
        **method.costs(trainer),
        "output": output,
    }


def split(examples: list[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Training and held-out examples; they come in random order."""
    held = round(share * len(examples))
    return examples[held:], examples[:held]


def measure(method: Any, trainer: Any, examples: list[Any]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in method.score(trainer, examples).items()} if examples else {}


def show(method: Any, summary: dict[str, Any], model: str) -> None:
    what, where = method.examples, "held-out" if summary["held_out"] else "training"
    name = "" if method.label == method.slug else f"{method.label}: "
    say(f"{name}{summary[what]} {what}, {summary['steps']} steps, {summary['seconds']} s; at {where} {what}:")
    for title, found in (("", summary), ("control, ", summary.get("control", {}))):
        for name, meaning in method.measures.items() if found else ():
            say(f"  {title + meaning:<46} {found['before'][name]:.3f} -> {found['after'][name]:.3f}")
    command = method.next_step.format(output=summary["output"], model=model)
    say(f"saved: {summary['output']}; try `{command}`")


def table(method: Any, variants: list[Any], answers: list[dict[str, Any]]) -> str:
    """A line for each variant: its measures after training, those at the control, and its costs."""
    first = answers[0]
    rows = [["", *method.measures, *(f"control {name}" for name in method.measures if "control" in first)]]
    rows[0] += ["seconds", *method.costs_named]
    start = [first["before"][name] for name in method.measures]
    start += [first["control"]["before"][name] for name in method.measures if "control" in first]
    rows.append(["before", *(f"{value:.4f}" for value in start), *["0"] * (1 + len(method.costs_named))])
    for variant, answer in zip(variants, answers):
        found = [answer["after"][name] for name in method.measures]
        found += [answer["control"]["after"][name] for name in method.measures if "control" in answer]
        costs = [answer["seconds"], *(answer[name] for name in method.costs_named)]
        rows.append([variant.label, *(f"{value:.4f}" for value in found), *(f"{value:.4g}" for value in costs)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)
