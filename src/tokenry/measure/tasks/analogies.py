"""The task `analogies`: which words of "a : b = c :" does the state of its last token hold, and which that follows?"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.analogies import Facts, Words, analogies
from ...learned.hyper_probe import Codebook
from ...read.hyper.states import compress_states, read_states
from ...read.hyperdimensional_probe import HyperdimensionalProbe
from ..task import Arm, Metric, Outcome, Sample

__all__ = ["AnalogyTask", "Guess"]

SPLITS = ("dev", "test")
HELD = 9  # word pairs that each split holds out


class Guess(NamedTuple):
    """What was read of a string: the partner of its first word, and its last one."""

    visible: str
    target: str


Reader = Callable[[Tensor, Sequence[Words]], list[Guess]]


class AnalogyTask:
    """Strings of two pairs. In one half of the samples no training string has the last pair, in the other half both
    pairs were trained, though never together. An arm's `apply(task, seed)` trains a reader of states.

    Args:
        facts: rows of country, capital, currency, or three others.
        count: samples of each half, at most.
    """

    slug: ClassVar[str] = "analogies"
    stage: ClassVar[str] = "read"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("target", "higher", "right about the word that follows, whose pair was never trained"),
        Metric("visible", "higher", "right about the partner of the first word, in the same strings"),
        Metric("known_target", "higher", "right about the word that follows, whose pair was trained in other strings"),
        Metric("known_visible", "higher", "right about the partner of the first word, in these strings"),
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        facts: Sequence[Facts],
        method: HyperdimensionalProbe,
        count: int,
        split: str = "test",
    ) -> None:
        self.model, self.tokenizer, self.method = model, tokenizer, method
        self.setting = {"split": split, "held": HELD, "facts": [list(row) for row in facts]}
        self.train, self.known, self.new = _split(analogies(facts), split, count)
        self.words = sorted({word for row in facts for word in row})
        self._readers: dict[tuple[str, int], Reader] = {}

    def samples(self) -> list[Sample]:
        both = [(words, new) for new, part in ((True, self.new), (False, self.known)) for words in part]
        return [Sample(" ".join(words), _prompt(words), {"words": words, "new": new}) for words, new in both]

    @cached_property
    def hidden(self) -> dict[Words, Tensor]:
        """The states (layers, width) of every string."""
        strings = [*self.train, *self.known, *self.new]
        states = read_states(self.model, self.tokenizer, [_prompt(words) for words in strings], 64)
        return dict(zip(strings, states))

    def states(self, strings: Sequence[Words], mean: bool = False) -> Tensor:
        """Compressed states (strings, width); `mean` over the layers instead of by k-means."""
        hidden = torch.stack([self.hidden[words] for words in strings])
        return compress_states(hidden, 0 if mean else self.method.n_clusters, self.method.normalize)

    def probe(
        self, seed: int, mean: bool = False, shuffled: bool = False, permuted: bool = False, constant: bool = False
    ) -> Reader:
        """A reader by hypervectors; `shuffled`: of the codes of other strings, `permuted`: dimensions at test time,
        `constant`: it learns from one state for all strings, and reads that one."""
        method = self.method.model_copy(update={"seed": seed})
        book = Codebook(self.words, method.dim, seed, method.tie)
        codes = torch.stack([book.encode_pairs([words[:2], words[2:]]) for words in self.train])
        draw = torch.Generator().manual_seed(seed)
        codes = codes[torch.randperm(len(codes), generator=draw)] if shuffled else codes
        known = self.states(self.train, mean)
        known = known.mean(0).expand_as(known) if constant else known
        probe = method.train(known, codes, book)
        order = torch.randperm(probe.d_model, generator=draw) if permuted else torch.arange(probe.d_model)

        def read(hidden: Tensor, strings: Sequence[Words]) -> list[Guess]:
            states = compress_states(hidden, 0 if mean else method.n_clusters, method.normalize)[:, order]
            states = known[: len(states)] if constant else states
            return [
                Guess(*(probe.read(state, [key], 1)[0][0] for key in (words[0], words[2])))
                for state, words in zip(states, strings)
            ]

        return read

    def linear(self, seed: int) -> Reader:
        """Two linear classifiers over all words on the same states: of the second word, and of the last one."""
        states = self.states(self.train)
        mean, deviation = states.mean(0), states.std(0).clamp(min=1e-6)
        heads = [
            _classifier(
                (states - mean) / deviation, [self.words.index(w[i]) for w in self.train], len(self.words), seed
            )
            for i in (1, 3)
        ]

        def read(hidden: Tensor, strings: Sequence[Words]) -> list[Guess]:
            found = (compress_states(hidden, self.method.n_clusters, self.method.normalize) - mean) / deviation
            best = [head(found).argmax(-1).tolist() for head in heads]
            return [Guess(self.words[a], self.words[b]) for a, b in zip(*best)]

        return read

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        if (arm.name, seed) not in self._readers:
            self._readers[arm.name, seed] = arm.apply(self, seed)
        start, strings = time.perf_counter(), [sample.data["words"] for sample in samples]
        guesses = self._readers[arm.name, seed](torch.stack([self.hidden[words] for words in strings]), strings)
        cost = {"seconds": (time.perf_counter() - start) / len(samples)}
        return [_outcome(sample, guess, cost) for sample, guess in zip(samples, guesses)]


def _outcome(sample: Sample, guess: Guess, cost: dict[str, Any]) -> Outcome:
    words, prefix = sample.data["words"], "" if sample.data["new"] else "known_"
    right = {"target": guess.target == words[3], "visible": guess.visible == words[1]}
    metrics = {prefix + name: float(value) for name, value in right.items()}
    return Outcome(metrics, cost, {"note": f"{sample.prompt} {guess.target} (first partner: {guess.visible})"})


def _classifier(states: Tensor, labels: list[int], classes: int, seed: int) -> torch.nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = torch.nn.Linear(states.shape[1], classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(head(states), torch.tensor(labels)).backward()
        optimizer.step()
    return head.requires_grad_(False)


def _prompt(words: Words) -> str:
    return "{} : {} = {} :".format(*words[:3])


def _split(strings: list[Words], split: str, count: int) -> tuple[list[Words], list[Words], list[Words]]:
    """Strings to train on, held-out ones of trained pairs, and those whose last pair the split holds out."""

    def ends(words: Words) -> list[tuple[str, ...]]:
        return [tuple(sorted(words[:2])), tuple(sorted(words[2:]))]

    pairs = sorted({pair for words in strings for pair in ends(words)})
    random.Random(0).shuffle(pairs)
    held = {name: set(pairs[i * HELD : (i + 1) * HELD]) for i, name in enumerate(SPLITS)}
    out = set().union(*held.values())
    free = [words for words in strings if not out & set(ends(words))]
    sets = sorted({tuple(sorted(ends(words))) for words in free})
    random.Random(f"{split} strings").shuffle(sets)
    apart = set(sets[: len(sets) // 10])
    known = [words for words in free if tuple(sorted(ends(words))) in apart]
    new = [words for words in strings if ends(words)[1] in held[split] and ends(words)[0] not in out]
    random.Random(1).shuffle(known)
    random.Random(2).shuffle(new)
    return [words for words in free if tuple(sorted(ends(words))) not in apart], known[:count], new[:count]
