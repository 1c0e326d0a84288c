"""Search over steps: several steps are written from each beginning of a text, valued, and the best go on.

Neither model reads a token twice: a beginning that goes on is a copy of its row of both caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ...core.errors import InputError
from ...core.fields import Count, Positive, Tokens, check
from ...learned.token_values import TokenValueModel
from ...models.batch import left_padded
from ...models.llamacpp.model import LlamaCppModel
from ...models.load import Loaded
from ...models.positions import check_prompt_fits, context_window
from ...models.prompts import prompt_ids
from ...text.token_text import TokenText
from ..generation.engine import TransformersEngine
from ..generation.sampler import Sampler
from .steps import prepared

__all__ = ["Beam", "SearchResult", "StepValues", "TreeShape", "shared_out", "step_beam_search"]


@dataclass(frozen=True)
class TreeShape:
    """How wide and deep is searched.

    Attributes:
        beams: beginnings that go on after each step.
        candidates: steps that are written from all of them together.
        allocation: "even" writes as many steps from each; "rebase" in proportion to softmax(value / balance), rounded
            up, the best first, as long as there are any left (arXiv 2408.00724).
        delimiter: text that ends a step, and belongs to it.
        max_steps: most steps of a text; None: no limit.
        max_step_tokens: a step of this length ends without the delimiter.

    Raises:
        InputError: a number out of range, or candidates that the beams do not divide.
    """

    beams: int = 4
    candidates: int = 16
    allocation: Literal["even", "rebase"] = "even"
    balance: float = 0.2
    delimiter: str = "\n"
    max_steps: int | None = None
    max_step_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("beams", "candidates"):
            check(name, getattr(self, name), Count)
        check("max_step_tokens", self.max_step_tokens, Tokens)
        check("balance", self.balance, Positive)
        if self.max_steps is not None:
            check("max_steps", self.max_steps, Count)
        if self.candidates % self.beams:
            raise InputError(
                f"candidates={self.candidates} cannot be shared out evenly to beams={self.beams}; give a multiple of "
                f"{self.beams}"
            )
        if not self.delimiter:
            raise InputError("the delimiter is empty; give the text that ends a step, such as a line break")

    def allot(self, values: Sequence[float]) -> list[int]:
        """How many steps are written from each of the beginnings with these values. What has finished takes its share
        with it."""
        each = self.candidates // self.beams
        if self.allocation == "even":
            return [each] * len(values)
        return shared_out(values, each * len(values), self.balance)


def shared_out(values: Sequence[float], total: int, balance: float) -> list[int]:
    """`total` in proportion to softmax(values / balance), each share rounded up, until nothing is left; the highest
    value takes first, the earlier of equals."""
    weights = (torch.tensor(values, dtype=torch.float64) / balance).softmax(0).tolist()
    shares, left = [0] * len(values), total
    for i in sorted(range(len(values)), key=lambda i: -values[i]):
        shares[i] = min(math.ceil(total * weights[i] - 1e-9), left)
        left -= shares[i]
    return shares


# --- values ----------------------------------------------------------------------------------------------------------


class StepValues(Protocol):
    """What rates beginnings. It follows the search row by row."""

    @property
    def tokens_processed(self) -> int: ...

    def read(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """The value of each row after these new tokens, at least one each; the first row is the prompt's."""
        ...

    def select(self, rows: Sequence[int]) -> None:
        """Go on with copies of these rows."""


class CachedValues:
    """Values of a `TokenValueModel`, which reads along with a cache of its own."""

    def __init__(self, model: TokenValueModel) -> None:
        self.model, self.engine = model, TransformersEngine(model, rewinds=True)

    @property
    def tokens_processed(self) -> int:
        return self.engine.tokens_processed

    def read(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """See `StepValues.read`."""
        return feed(self.engine, rows, self.model.device)[:, 0].sigmoid().tolist()

    def select(self, rows: Sequence[int]) -> None:
        """See `StepValues.select`."""
        self.engine.select(rows)


class FunctionValues:
    """Values of a function of prompt and new tokens, such as the true values of a process that is known."""

    def __init__(self, value: Callable[[list[int], list[int]], float]) -> None:
        self.value, self.rows, self.tokens_processed = value, [[]], 0
        self.prompt: list[int] = []

    def read(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """See `StepValues.read`."""
        if not self.prompt:
            self.prompt, rows = list(rows[0]), [[]]
        self.rows = [[*held, *new] for held, new in zip(self.rows, rows, strict=True)]
        return [float(self.value(self.prompt, row)) for row in self.rows]

    def select(self, rows: Sequence[int]) -> None:
        """See `StepValues.select`."""
        self.rows = [self.rows[row] for row in rows]


def feed(engine: TransformersEngine, rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Feed each row its tokens, right-aligned; rows without any are padding, and their scores mean nothing."""
    tokens, mask = left_padded(rows, device)
    return engine.forward(tokens, None if bool(mask.all()) else mask)


# --- the search ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Beam:
    """A text on its way: its new tokens, and the value after each of its steps."""

    ids: list[int]
    values: list[float]

    @property
    def value(self) -> float:
        """After its last step; 0.5 before the first."""
        return self.values[-1] if self.values else 0.5


@dataclass(frozen=True)
class SearchResult:
    """The text that was found, and what it cost.

    Attributes:
        best: the finished text of the highest value, the first of equals; where none is, the best unfinished one.
        finished: all that were finished, in the order of their ends.
        written: tokens that were drawn.
        fed, value_fed: tokens that the generator and the value model have read.
        reread: what both would have read together, had every candidate been read from its beginning.
        calls: forward passes of the generator.
    """

    best: Beam
    finished: list[Beam]
    written: int
    fed: int
    value_fed: int
    reread: int
    calls: int

    @property
    def kept(self) -> int:
        """Tokens of the text that was found."""
        return len(self.best.ids)


def step_beam_search(
    generator: Loaded,
    values: TokenValueModel | Callable[[list[int], list[int]], float],
    prompt: str | Sequence[int],
    shape: TreeShape | None = None,
    *,
    max_new_tokens: int = 256,
    seed: int | None = None,
    **options: Any,
) -> SearchResult:
    """Look for the text of the highest value, step by step (arXiv 2407.12863).

    Each beginning is continued by several steps, each is valued at its last token, and the best `shape.beams` go on,
    the earlier of equals. Those that have ended are finished. It stops when as many are finished as there are beams.

    Args:
        values: a value model with the generator's vocabulary, or a function of the prompt's and the new tokens.
        prompt: ids, or a text, which goes through the chat template where there is one.
        max_new_tokens: a text that has not ended by then is not continued.
        seed: makes sampling repeatable; every candidate has its own generator. None: torch's global one.
        options: what `generate` takes to draw tokens, such as do_sample and temperature.

    Raises:
        InputError: another vocabulary, a prompt without room behind it, or a model whose cache has no rows to copy.
    """
    model, tokenizer = generator
    check("max_new_tokens", max_new_tokens, Tokens)
    if isinstance(model, LlamaCppModel):
        raise model.refusal("a search that copies rows of the cache")
    if isinstance(values, TokenValueModel):
        values.check(tokenizer)
    ids = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)
    readers = [model, values] if isinstance(values, TokenValueModel) else [model]
    room = [max_new_tokens]
    for reader in readers:
        check_prompt_fits(reader, len(ids))
        room += [window - len(ids) for window in [context_window(reader)] if window is not None]
    shape = shape or TreeShape()
    processors, config, ends = prepared(model, options)
    sampler = Sampler(processors, config.do_sample, seed, shape.candidates, model.device)
    rates = CachedValues(values) if isinstance(values, TokenValueModel) else FunctionValues(values)
    with torch.no_grad():
        return TreeSearch(generator, ids, rates, shape, sampler, ends, min(room)).run()


class TreeSearch:
    """The search of one prompt.

    Args:
        ends: tokens that end a text.
        budget: most new tokens of a text.
    """

    def __init__(
        self,
        generator: Loaded,
        prompt: list[int],
        values: StepValues,
        shape: TreeShape,
        sampler: Sampler,
        ends: set[int],
        budget: int,
    ) -> None:
        self.model, self.tokenizer = generator
        self.prompt, self.values, self.shape, self.sampler = prompt, values, shape, sampler
        self.ends, self.budget = ends, budget
        self.engine = TransformersEngine(self.model, rewinds=True)
        self.live, self.finished, self.cut = [Beam([], [])], [], []
        self.written = self.reread = 0

    def run(self) -> SearchResult:
        """Step by step, until as many texts are finished as there are beams, or none may go on."""
        logits = self._feed([self.prompt])
        self.values.read([self.prompt])
        steps = 0
        while self.live and steps != self.shape.max_steps:
            if steps:
                logits = self._feed([beam.ids[-1:] for beam in self.live])
            shares = self._shares()
            parents = [i for i, count in enumerate(shares) for _ in range(count)]
            self._select(parents)
            beams = [self.live[i] for i in parents]
            self._select(self._choose(beams, self._write(beams, logits[parents])))
            steps += 1
        return self._result()

    def _shares(self) -> list[int]:
        """How many steps each live beam gets; the first ones, of the prompt alone, are all."""
        if self.live[0].ids:
            return self.shape.allot([beam.value for beam in self.live])
        return [self.shape.candidates]

    def _select(self, rows: Sequence[int]) -> None:
        if rows:
            self.engine.select(rows)
            self.values.select(rows)

    def _feed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return feed(self.engine, rows, self.model.device)

    def _write(self, beams: Sequence[Beam], logits: Tensor) -> list[list[int]]:
        """One step behind each of the beams. Its last token is read only if it goes on."""
        drafts: list[list[int]] = [[] for _ in beams]
        texts = [TokenText(self.tokenizer, [*self.prompt, *beam.ids], skip_special=False) for beam in beams]
        going = list(range(len(beams)))
        while True:
            for row in going:
                token = self._draw(row, [*self.prompt, *beams[row].ids, *drafts[row]], logits[row])
                drafts[row].append(token)
                texts[row].append(token)
            going = [row for row in going if not self._complete(texts[row], beams[row])]
            if not going:
                break
            open_rows = set(going)
            logits = self._feed([draft[-1:] if row in open_rows else [] for row, draft in enumerate(drafts)])
        self.written += sum(map(len, drafts))
        whole = [len(self.prompt) + len(beam.ids) + len(draft) for beam, draft in zip(beams, drafts)]
        self.reread += sum(2 * length - 1 for length in whole)  # the generator does not read the last token
        return drafts

    def _draw(self, row: int, ids: list[int], logits: Tensor) -> int:
        return self.sampler.redraw(row, torch.tensor([ids], device=logits.device), logits, 0, False)[0]

    def _complete(self, text: TokenText, beam: Beam) -> bool:
        """Whether the step is over: the text is, its delimiter is there, or there is no room."""
        length = len(text.ids)
        full = length >= self.shape.max_step_tokens or len(beam.ids) + length >= self.budget
        return full or text.ids[-1] in self.ends or self.shape.delimiter in text.text

    def _choose(self, beams: Sequence[Beam], drafts: Sequence[list[int]]) -> list[int]:
        """Value the steps and keep the best; returns the rows that go on."""
        values = self.values.read(drafts)
        grown = [Beam([*b.ids, *d], [*b.values, v]) for b, d, v in zip(beams, drafts, values, strict=True)]
        room = self.shape.beams - len(self.finished)
        best = sorted(range(len(grown)), key=lambda i: -values[i])[:room]
        ended = {i for i in best if drafts[i][-1] in self.ends}
        cut = {i for i in best if i not in ended and len(grown[i].ids) >= self.budget}
        going = [i for i in best if i not in ended | cut]
        self.finished += [grown[i] for i in best if i in ended]
        self.cut += [grown[i] for i in best if i in cut]
        self.live = [grown[i] for i in going]
        return going

    def _result(self) -> SearchResult:
        best = max(self.finished or [*self.live, *self.cut], key=lambda beam: beam.value)
        read = (self.engine.tokens_processed, self.values.tokens_processed)
        return SearchResult(best, self.finished, self.written, *read, self.reread, self.engine.calls)
