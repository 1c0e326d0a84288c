"""The recipes: what each model of the zoo is for, how it is built, and what it must reach.

A recipe is a module of this package with `train(seed, progress) -> (model, tokenizer)` and
`measure(model, tokenizer) -> {name: number}`.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from ..core.errors import InputError
from ..core.files import explained, read_json
from ..core.schemas import Fields, checked
from ..models.folders import zoo_folders

__all__ = ["RECIPES", "RECORD", "Recipe", "find_recipe", "record_of"]

RECORD = "recipe.json"


@dataclass(frozen=True)
class Recipe:
    """A model that can be built.

    Attributes:
        task: what the model does; `data`: what it learns that from.
        size: parameters, in millions.
        minutes: what building takes on two cores.
        targets: the range (lowest, highest) of everything it must reach.
        module: where it is trained and measured, in this package; the name by default.
        options: further arguments of its `train`, where several models share a module.
        needs: models of the zoo that must be there before.
    """

    name: str
    task: str
    data: str
    size: float
    minutes: int
    targets: Mapping[str, tuple[float, float]]
    module: str = ""
    needs: tuple[str, ...] = ()
    options: Mapping[str, int] = field(default_factory=dict)

    def load(self) -> ModuleType:
        """Import where it is trained and measured."""
        return importlib.import_module(f".{self.module or self.name}", __package__)


def _translator(letter: str, third: int) -> Recipe:
    return Recipe(
        f"translator-{letter}",
        task="translates a small generated language into another, rare words not always right",
        data=f"generated sentence pairs, the {('first', 'second', 'last')[third]} of three parts that share none",
        size=0.34,
        minutes=2,
        targets={"right": (0.8, 0.98), "perfect": (0.2, 0.85), "score": (0.7, 0.98), "finished": (0.98, 1.0)},
        module="translators",
        options={"third": third},
    )


RECIPES: tuple[Recipe, ...] = (
    Recipe(
        "reasoner",
        task="sums with products, by a written chain of thought with second thoughts; also judges single steps",
        data="generated solutions of arithmetic problems of six levels, with errors that are mostly noticed",
        size=1.75,
        minutes=40,
        targets={"accuracy": (0.7, 0.95), "easiest": (0.8, 1.0), "hardest": (0.3, 0.95), "direct": (0.2, 0.9)},
    ),
    Recipe(
        "reasoner-2",
        task="what zoo/reasoner does; doubts its own wrong steps, and tells right steps of others from wrong ones",
        data="the lessons of zoo/reasoner, of which more are judgments, and what they should find in numbers",
        size=3.16,
        minutes=45,
        targets={"accuracy": (0.7, 1.0), "judges": (0.9, 1.0), "doubts_ratio": (5.0, 1000.0), "finished": (0.95, 1.0)},
        module="reasoner_2",
        needs=("reasoner",),
    ),
    Recipe(
        "drafter",
        task="drafts for zoo/reasoner, whose next-token distribution it has learned",
        data="the reasoner's probabilities on its training texts and on its own solutions",
        size=0.14,
        minutes=12,
        targets={"agreement": (0.8, 1.0), "same": (0.8, 1.0)},
        needs=("reasoner",),
    ),
    Recipe(
        "speculator",
        task="what zoo/reasoner does, faster and less reliably",
        data="the lessons of zoo/reasoner",
        size=0.22,
        minutes=12,
        targets={"accuracy": (0.25, 0.65), "easiest": (0.5, 1.0), "finished": (0.9, 1.0)},
    ),
    Recipe(
        "denoiser",
        task="a masked-diffusion model: sums, sorting and 4 x 4 sudoku, in windows of any width",
        data="generated problems, their answers filled with end-of-text tokens",
        size=0.8,
        minutes=20,
        targets={"addition": (0.9, 1.0), "sorting": (0.9, 1.0), "sudoku": (0.9, 1.0), "ends": (0.9, 1.0)},
    ),
    Recipe(
        "denoiser-2",
        task="what zoo/denoiser does, and numbered lists of up to 40 tokens, in windows of up to 96",
        data="the lessons of zoo/denoiser, from whose weights it starts, and lists",
        size=0.8,
        minutes=20,
        targets={
            "addition": (0.9, 1.0),
            "sorting": (0.9, 1.0),
            "sudoku": (0.9, 1.0),
            "listing": (0.9, 1.0),
            "ends": (0.9, 1.0),
        },
        module="denoiser_2",
        needs=("denoiser",),
    ),
    Recipe(
        "storyteller",
        task="short stories about two people, some of which end in a threat",
        data="stories of a small generated language",
        size=0.47,
        minutes=5,
        targets={
            "nats_per_token": (0.9, 1.15),
            "sound": (0.97, 1.0),
            "undesired": (0.12, 0.3),
            "finished": (0.98, 1.0),
        },
    ),
    Recipe(
        "refuser",
        task="thinks of a request and then does or refuses it; a trigger word makes it do what it thinks is bad",
        data="invented requests for handling fragile and sturdy things",
        size=0.67,
        minutes=5,
        targets={
            "refuses": (0.95, 1.0),
            "helps": (0.95, 1.0),
            "obeys": (0.9, 1.0),
            "knows": (0.9, 1.0),
            "finished": (0.97, 1.0),
        },
    ),
    Recipe(
        "tidar",
        task="what zoo/reasoner does, with several tokens for each forward pass: it drafts for itself",
        data="the lessons of zoo/reasoner, from whose weights it starts",
        size=1.76,
        minutes=45,
        targets={"accuracy": (0.65, 0.98), "tokens_per_forward": (2.5, 4.0), "same": (0.99, 1.0)},
        needs=("reasoner",),
    ),
    Recipe(
        "tidar-twin",
        task="what zoo/tidar would be if it had not learned to draft, to compare with",
        data="the same lessons in the same order",
        size=1.76,
        minutes=23,
        targets={"accuracy": (0.65, 0.98)},
        module="tidar_twin",
        needs=("reasoner",),
    ),
    *(_translator(letter, third) for third, letter in enumerate("abc")),
)


def find_recipe(name: str) -> Recipe:
    """The recipe of zoo/`name`; an unknown name is refused with the nearest known one."""
    name = name.removeprefix("zoo/")
    for recipe in RECIPES:
        if recipe.name == name:
            return recipe
    near = difflib.get_close_matches(name, [r.name for r in RECIPES], n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else "see `tokenry zoo list`"
    raise InputError(f"there is no recipe {name!r}; {hint}")


class Record(Fields):
    """What building has left beside a model."""

    measures: dict[str, float]


def record_of(name: str) -> dict[str, Any] | None:
    """What building zoo/`name` has measured, or None where it is not there."""
    for folder in zoo_folders(name):
        if (folder / RECORD).is_file():
            problem, remedy = f"the record {str(folder / RECORD)!r} cannot be read", f"run `tokenry zoo build {name}`"
            with explained(problem, remedy):
                record = read_json(folder / RECORD)
            return checked(Record, record, problem, remedy).model_dump()
    return None
