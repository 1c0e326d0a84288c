"""Building a model of the zoo: it is trained from its seed, saved in Hugging Face format with half precision weights,
measured as it was saved, and taken only if every measure lies in its range.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..core.errors import InputError
from ..core.outputs import check_folder, write_folder
from ..core.progress import Progress
from ..models.folders import zoo_folders
from ..models.load import Loaded, load
from .recipes import RECORD, Recipe, find_recipe

__all__ = ["build", "missed", "save"]


def build(
    name: str,
    output: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    force: bool = False,
) -> Path:
    """Train the model from its recipe, measure it, and put it where it belongs if it reaches what it must.

    Args:
        output: the folder; by default where `tokenry.load("zoo/...")` finds it.
        progress: called with (steps done, steps, loss).
        force: write also into a folder with other files, which stay.

    Returns:
        The folder, complete: it is written beside its place and renamed.

    Raises:
        InputError: unknown recipe, a model that it needs is missing, a measure outside its range, or a folder that
            cannot be written. A model that was measured is kept: beside the folder, where nothing looks for it.
    """
    recipe = find_recipe(name)
    for needed in recipe.needs:
        load(f"zoo/{needed}")
    force = force or output is None
    target = check_folder(output or zoo_folders(recipe.name)[1], force)
    module, start = recipe.load(), time.perf_counter()
    model, tokenizer = module.train(seed, progress, **recipe.options)
    seconds = time.perf_counter() - start
    with TemporaryDirectory() as scratch:
        made = Path(scratch) / recipe.name
        save(Loaded(model, tokenizer), made)
        measures = module.measure(*load(made, device="cpu"))
        (made / RECORD).write_text(json.dumps(_record(recipe, seed, seconds, model, measures), indent=1) + "\n")
        problem = missed(recipe, measures)
        place = target.with_name(f"{target.name}.rejected") if problem else target
        write_folder(place, lambda work: shutil.copytree(made, work, dirs_exist_ok=True), force or bool(problem))
    if problem:
        raise InputError(f"{problem}; train longer, or with another seed; what was trained is in {str(place)!r}")
    return target


def save(loaded: Loaded, folder: Path) -> None:
    """In Hugging Face format, half precision."""
    half = loaded.model.to(torch.float16)  # pyright: ignore[reportArgumentType]  # wrapped, it does not look like a method
    half.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def missed(recipe: Recipe, measures: Mapping[str, float]) -> str:
    """What is outside of its range, in a sentence; empty where all is within."""
    ranges = {name: (measures[name], low, high) for name, (low, high) in recipe.targets.items()}
    said = [
        f"{name} {value:.3f}, and must reach {low} to {high}"
        for name, (value, low, high) in ranges.items()
        if not low <= value <= high
    ]
    return f"zoo/{recipe.name} reaches {'; '.join(said)}" if said else ""


def _record(recipe: Recipe, seed: int, seconds: float, model: Any, measures: Mapping[str, float]) -> dict[str, Any]:
    from transformers import __version__ as transformers

    return {
        "recipe": recipe.name,
        "seed": seed,
        "parameters": model.num_parameters(),
        "measures": {name: round(float(value), 4) for name, value in measures.items()},
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers},
        "date": datetime.now(UTC).date().isoformat(),
    }
