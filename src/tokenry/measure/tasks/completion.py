"""The task `completion`: the next value at places of programs that a model of code has not seen, by rank."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from keyword import iskeyword
from typing import Any, ClassVar, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...decode.completion.ranking import Candidate, Weights, rerank
from ...decode.completion.search import next_values, vocabulary_of
from ...models.anatomy import vocabulary_size
from ...text.code.scopes import VisibleNames, name_kind
from ...text.code.views import CodeViews
from ..task import Arm, Metric, Outcome, Sample

__all__ = ["CompletionTask", "Place"]

CONTEXT = 128  # tokens that the model reads
BEHIND = 24  # values of a file that stand before the first place
TOP, BEAM = 10, 5
BATCH = 24
NAMES = {"LOCAL_VARIABLE", "GLOBAL_VARIABLE", "FUNCTION_CALL", "MODULE", "LIBRARY", "LIB", "ALIAS"}


class Place(NamedTuple):
    """A value to be found: what stands left of it, whether it is a name, or at a cardinal point, and
    which names are visible there."""

    values: tuple[str, ...]
    wanted: str
    is_name: bool
    is_cardinal: bool
    visible: VisibleNames


class CompletionTask:
    """A sample is a package; its numbers are means over places of it.

    An arm's `apply` is {"model": a key of `model(key, seed)`, "weights": the table to re-rank by, or None}.
    """

    slug: ClassVar[str] = "completion"
    stage: ClassVar[str] = "train"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("mrr", "higher", "MRR@10 of the next value, all places"),
        Metric("accuracy", "higher", "next value right, all places"),
        Metric("cardinal_mrr", "higher", "MRR@10 at cardinal points"),
        Metric("cardinal_accuracy", "higher", "next value right at cardinal points"),
        Metric("name_mrr", "higher", "MRR@10 where a name stands"),
    )

    def __init__(
        self,
        packages: Mapping[str, Sequence[CodeViews]],
        cardinal: Collection[str],
        tokenizer: PreTrainedTokenizerBase,
        model: Callable[[str, int], PreTrainedModel],
        places: int,
    ) -> None:
        self.tokenizer, self.model = tokenizer, model
        self.setting = {"context": CONTEXT, "top": TOP, "beam": BEAM, "cardinal": sorted(cardinal)}
        self.places = {name: _places(views, cardinal, places, name) for name, views in packages.items()}
        if not all(self.places.values()):
            raise InputError(f"a package has no file of {BEHIND + 2} values; leave it out")
        self.found: dict[tuple[str, int, str], list[list[Candidate]]] = {}

    def samples(self) -> list[Sample]:
        return [
            Sample(name, f"{len(places)} places", {"wanted": [place.wanted for place in places]})
            for name, places in self.places.items()
        ]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        return [self._measured(arm.apply, sample.id, seed) for sample in samples]

    def _measured(self, apply: Mapping[str, Any], name: str, seed: int) -> Outcome:
        places = self.places[name]
        ranks = [
            _rank(place, candidates, apply["weights"])
            for place, candidates in zip(places, self._candidates(apply["model"], name, seed))
        ]
        groups = {
            "": ranks,
            "cardinal_": [rank for rank, place in zip(ranks, places) if place.is_cardinal],
            "name_": [rank for rank, place in zip(ranks, places) if place.is_name],
        }
        means = {f"{group}mrr": _mean([1 / rank if rank else 0.0 for rank in found]) for group, found in groups.items()}
        means |= {f"{group}accuracy": _mean([rank == 1 for rank in found]) for group, found in groups.items()}
        return Outcome({metric.name: means[metric.name] for metric in self.metrics}, detail={"ranks": ranks})

    def _candidates(self, key: str, name: str, seed: int) -> list[list[Candidate]]:
        """What a model offers at the places of a package; the same for all tables of weights."""
        if (key, seed, name) not in self.found:
            model, places = self.model(key, seed), self.places[name]
            vocabulary = vocabulary_of(self.tokenizer, vocabulary_size(model))
            found = []
            for start in range(0, len(places), BATCH):
                batch = places[start : start + BATCH]
                texts = ["".join(f" {value}" for value in place.values[-CONTEXT:]) for place in batch]
                ids = [row[-CONTEXT:] for row in self.tokenizer(texts, add_special_tokens=False).input_ids]
                found += next_values(model, vocabulary, ids, BEAM, TOP, names_only=False)
            self.found[key, seed, name] = [
                [Candidate(one.value, one.probability, _kind(one.value, place)) for one in offered]
                for place, offered in zip(places, found)
            ]
        return self.found[key, seed, name]


def _places(files: Sequence[CodeViews], cardinal: Collection[str], count: int, name: str) -> list[Place]:
    """Random places of the files of a package, the same for every arm."""
    all_places = [(views, i) for views in files for i in range(BEHIND, len(views.values))]
    chosen = random.Random(f"places of {name}").sample(all_places, min(count, len(all_places)))
    return [
        Place(
            views.values[:i],
            views.values[i],
            views.types[i] in NAMES,
            views.values[i - 1] in cardinal,
            VisibleNames(views.values[:i]),
        )
        for views, i in chosen
    ]


def _kind(value: str, place: Place) -> str:
    if not value.isidentifier() or iskeyword(value):
        return "mark"
    return name_kind(place.values[-1], place.visible.is_function(value))


def _rank(place: Place, candidates: Sequence[Candidate], weights: Weights | None) -> int | None:
    """The rank of the value that stands there, counted from 1; None beyond the last."""
    if weights is None:
        ranked = list(candidates)
    else:
        ranked = [one.candidate for one in rerank(candidates, place.visible.scope, weights, TOP)]
    values = [one.value for one in ranked]
    return values.index(place.wanted) + 1 if place.wanted in values else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
