"""train: teach a model with token-level signal."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from ..errors import InputError
from .shared import as_json, example, load_model, model_options, parse_methods, progress


@click.command(epilog=example("tokenry train --method ftpo --data pairs.jsonl --output smollm2-without-slop"))
@click.option("--method", "slug", required=True, help="A train method.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--data", required=True, help="Pairs, a JSON line each: `tokenry decode --save-pairs` writes them.")
@click.option("--output", required=True, help="New folder for the trained model.")
@click.option("--hold-out", default=0.1, show_default=True, help="Share of the pairs that is only measured.")
@model_options
def train(
    slug: str,
    options: tuple[str, ...],
    data: str,
    output: str,
    hold_out: float,
    model_name: str,
    dtype: str | None,
    device: str | None,
    json_output: bool,
) -> None:
    """Train a model on preference pairs, and show what it does at held-out ones before and after."""
    (method,) = parse_methods([slug], options, "train")
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"the output {output!r} exists and is not an empty folder; give a new one")
    if not 0 <= hold_out < 1:
        raise InputError(f"--hold-out {hold_out} is not allowed; give a share in [0, 1)")
    from ..train import read_pairs

    rows = read_pairs(data)
    model, tokenizer = load_model(model_name, dtype, device)
    kept, held = split(method.pairs(rows, tokenizer), hold_out)
    with progress(slug, None) as update, TemporaryDirectory() as scratch:
        trainer = method.trainer(model, tokenizer, kept, scratch, progress=update)
        before = measure(trainer, held or kept)
        trained = trainer.train()
    after = measure(trainer, held or kept)
    save(trainer, tokenizer, folder)
    summary = {
        "pairs": len(kept),
        "held_out": len(held),
        "steps": trainer.state.global_step,
        "seconds": round(trained.metrics["train_runtime"], 1),
        "before": before,
        "after": after,
        "output": output,
    }
    as_json(summary) if json_output else show(summary)


def split(pairs: list[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Training and held-out pairs; the pairs are shuffled already."""
    held = round(share * len(pairs))
    return pairs[held:], pairs[:held]


def measure(trainer: Any, pairs: list[Any]) -> dict[str, float]:
    from ..train import score_pairs

    scores = score_pairs(trainer.model, pairs, trainer.data_collator)
    return {name: round(float(column.mean()), 4) for name, column in scores.items()}


def save(trainer: Any, tokenizer: Any, folder: Path) -> None:
    """The merged model, which loads anywhere, and the adapter beside it."""
    from ..train import merged, save_adapter

    save_adapter(trainer.model, folder / "adapter")
    merged(trainer.model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def show(summary: dict[str, Any]) -> None:
    before, after = summary["before"], summary["after"]
    where = "held-out" if summary["held_out"] else "training"
    click.echo(f"{summary['pairs']} pairs, {summary['steps']} steps, {summary['seconds']} s; at {where} pairs:")
    meanings = {
        "rejected": "probability of the rejected token",
        "chosen": "probability of the chosen tokens",
        "choice_win": "share of chosen tokens above the rejected one",
        "drift": "mean change of the other logits",
    }
    for name, meaning in meanings.items():
        click.echo(f"  {meaning:<46} {before[name]:.3f} -> {after[name]:.3f}")
    click.echo(f"saved: {summary['output']}; try `tokenry decode --model {summary['output']} PROMPT`")
