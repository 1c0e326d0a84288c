"""One model under many generations that begin and end at any time: each has a slot, and all are fed in one forward.

A slot is written by a `DecodeLoop` of one row, through a `Slot`; whoever owns the engine may also drive many such loops
together:

    blocks = {slot: the tokens that its loop has pending}
    for slot, logits in engine.forward(blocks).items(): ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ...core.errors import InputError
from ...models.batch import left_padded
from ...models.kv_cache import (
    cache_bytes,
    forward_arguments,
    gather_columns,
    is_sliding,
    join_rows,
    new_cache,
    remove_last,
    rewind_obstacle,
    row_of,
    state_argument,
)
from ...models.positions import position_obstacle, stretched_positions
from ..generation.engine import check_padding
from ..generation.grid import Grid

__all__ = ["CountsBytes", "SharedEngine", "SharedTransformersEngine", "Slot", "sharing_obstacle"]

COMPACT_ABOVE = 0.25  # share of dead columns at which a batch is compacted
WASTE = 2  # texts come together while that makes their cells at most so many times as many ...
FREE_COLUMNS = 256  # ... besides as many columns each


class SharedEngine(Protocol):
    """A model that writes several texts, each in a slot of its own. Only one thread may use it."""

    def join(self) -> int:
        """A new, empty slot."""
        ...

    def forward(self, blocks: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Feed each of these slots its new tokens; returns its float32 logits (vocabulary,) after the last one."""
        ...

    def rollback(self, slot: int, count: int) -> None:
        """Take back the last `count` tokens that were fed to a slot."""

    def free(self, slot: int) -> None:
        """A text is over: give back what is held for it. The slot is no more."""


@runtime_checkable
class CountsBytes(Protocol):
    """A shared engine that knows how much its caches hold."""

    def cache_bytes(self) -> int: ...


class Slot:
    """A slot of a shared engine, as the `Engine` of a decode loop with one row. It joins with the first block, and what
    it counts is its own text's share."""

    cache: Any = None  # nobody can go on from there

    def __init__(self, shared: SharedEngine) -> None:
        self.shared = shared
        self.number: int | None = None
        self.calls = self.tokens_processed = 0

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        block = tokens[0] if mask is None else tokens[0][mask[0].bool()]
        number = self.feeding(len(block))
        return self.shared.forward({number: block.tolist()})[number][None]

    def feeding(self, count: int) -> int:
        """Count tokens that are about to be fed; returns the number of the slot."""
        if self.number is None:
            self.number = self.shared.join()
        self.calls += 1
        self.tokens_processed += count
        return self.number

    def rollback(self, row: int, count: int) -> None:
        if self.number is not None:
            self.shared.rollback(self.number, count)

    def free(self, row: int = 0) -> None:
        if self.number is not None:
            self.shared.free(self.number)
        self.number = None


def sharing_obstacle(model: PreTrainedModel) -> str | None:
    """Why texts of different lengths cannot come into and leave a batch of this model, or None if they can."""
    name = type(model).__name__
    try:
        if state_argument(model) != "past_key_values":
            return f"{name} keeps no cache of keys and values"
        cache = new_cache(model)
        if cache is None:
            return f"{name} makes a cache of its own"
        if getattr(model.config.get_text_config(), "attention_chunk_size", None):
            return f"{name} cuts the columns of a batch into chunks"
        if stretched_positions(model):
            return f"the positions of {name} depend on the longest text of a batch"
        why = rewind_obstacle(cache) or position_obstacle(model)
        if why is None:
            check_padding(model)
        return why
    except InputError as error:
        return str(error)


class SharedTransformersEngine:
    """A `PreTrainedModel` under many texts.

    Texts share the columns of a batch as long as they are fed single tokens. A new one, or one that gets several tokens
    at once, is fed by itself (new ones of about the same length together), and its columns join the batch with its
    next single token, behind padding that the mask hides. A text that would stretch a batch much has another one.

    Raises:
        InputError: a model whose cache cannot be put together, see `sharing_obstacle`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        obstacle = sharing_obstacle(model)
        if obstacle:
            raise InputError(f"texts cannot share a batch: {obstacle}; give each an engine of its own")
        self.model = model
        self.batches: list[_Batch] = []
        self.places: dict[int, _Batch | None] = {}  # None: nothing was fed yet
        self.count = self.calls = 0

    def join(self) -> int:
        self.count += 1
        self.places[self.count] = None
        return self.count

    @torch.no_grad()
    def forward(self, blocks: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        for batch in self.batches:
            batch.tidy()
        self._take_apart(blocks)
        self._put_together(blocks)
        self._begin({slot: block for slot, block in blocks.items() if self.places[slot] is None})
        logits: dict[int, Tensor] = {}
        for batch in self.batches:
            fed = {slot: blocks[slot] for slot in batch.slots if slot in blocks}
            if fed:
                logits |= batch.forward(fed)
                self.calls += 1
        return logits

    def rollback(self, slot: int, count: int) -> None:
        batch = self.places[slot]
        if count and batch is not None:
            batch.rollback(slot, count)

    def free(self, slot: int) -> None:
        batch = self.places.pop(slot)
        if batch is not None:
            batch.leaving.append(slot)
            self.batches = [batch for batch in self.batches if batch.slots]

    def cache_bytes(self) -> int:
        return sum(cache_bytes(batch.cache) for batch in self.batches)

    # --- who is fed with whom ------------------------------------------------------------------------------

    def _add(self, batch: _Batch) -> None:
        self.batches.append(batch)
        self.places |= dict.fromkeys(batch.slots, batch)

    def _begin(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """New batches for first blocks, of which the longest has at most twice the tokens of the shortest."""
        groups: list[list[int]] = []
        for slot in sorted(prompts, key=lambda slot: len(prompts[slot])):
            if not groups or len(prompts[slot]) > 2 * len(prompts[groups[-1][0]]):
                groups.append([])
            groups[-1].append(slot)
        for group in groups:
            self._add(_Batch.empty(self.model, group))

    def _take_apart(self, blocks: Mapping[int, Sequence[int]]) -> None:
        """Whoever gets several tokens is fed alone."""
        for batch in list(self.batches):
            for slot in batch.slots:
                if len(blocks.get(slot, ())) > 1 and len(batch.slots) > 1:
                    self._add(batch.part(slot))
            batch.tidy()

    def _put_together(self, blocks: Mapping[int, Sequence[int]]) -> None:
        """Whoever gets a single token shares a batch."""
        kept: list[_Batch] = []
        for batch in self.batches:
            steady = all(len(blocks.get(slot, ())) == 1 for slot in batch.slots)
            into = next((one for one in kept if steady and one.steady and one.has_room_for(batch)), None)
            if into is None:
                batch.steady = steady
                kept.append(batch)
                continue
            into.join(batch)
            self.places |= dict.fromkeys(batch.slots, into)
        self.batches = kept


class _Batch:
    """Texts in the columns of one cache."""

    def __init__(self, model: PreTrainedModel, cache: Cache, grid: Grid) -> None:
        self.model, self.cache, self.grid = model, cache, grid
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in forward_arguments(model) else {}
        self.leaving: list[int] = []  # they go with the next forward, all at once
        self.changed = False  # columns may be dead that were not
        self.steady = False  # all are fed single tokens
        self.sliding = is_sliding(cache)

    @classmethod
    def empty(cls, model: PreTrainedModel, slots: Sequence[int]) -> _Batch:
        cache = new_cache(model)
        assert cache is not None, "the engine has asked for what stands against it"
        grid = Grid(torch.zeros(len(slots), 0, dtype=torch.long, device=model.device), None)
        grid.places = {slot: place for place, slot in enumerate(slots)}
        return cls(model, cache, grid)

    @property
    def slots(self) -> list[int]:
        return [slot for slot in self.grid.places if slot not in self.leaving]

    def forward(self, blocks: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Feed these; the others get padding."""
        grid, start = self.grid, self.grid.columns
        rows = [blocks.get(slot, ()) for slot in grid.places]
        tokens, mask = left_padded(rows, grid.tokens.device)
        even = len({*map(len, rows)}) == 1
        positions, _ = grid.add(tokens, None if even else mask)
        inputs = {"input_ids": tokens, "position_ids": positions, "past_key_values": self.cache, "use_cache": True}
        if grid.padded:
            inputs["attention_mask"] = grid.mask[:, : grid.columns].long()
        logits = self.model(**inputs, **self.last_only, return_dict=True).logits[:, -1]
        if start == 0:
            self.cache.activate_past_recording()  # windows must keep what a rollback may need
        self.changed = self.changed or (start > 0 and not even)
        # copies: one text that keeps its scores would keep those of all
        return {slot: logits[grid.places[slot]].to(dtype=torch.float32, copy=True) for slot in blocks}

    def rollback(self, slot: int, count: int) -> None:
        if self.grid.batch == 1 and not self.grid.padded:
            remove_last(self.cache, [count] * len(self.cache.layers))
            self.grid.shorten(count)
        else:
            self.grid.mark_dead(self.grid.places[slot], count)
            self.changed = True

    def part(self, slot: int) -> _Batch:
        """A batch with this text alone, which leaves here."""
        one = _Batch(self.model, row_of(self.cache, self.grid.places[slot]), self.grid.only(slot))
        self.leaving.append(slot)
        one.changed = True
        one.tidy()
        return one

    def has_room_for(self, other: _Batch) -> bool:
        rows, columns = zip(*((one.grid.batch, one.grid.columns) for one in (self, other)))
        apart = sum(count * width for count, width in zip(rows, columns))
        return sum(rows) * max(columns) <= WASTE * apart + sum(rows) * FREE_COLUMNS

    def join(self, other: _Batch) -> None:
        """Take the texts of another batch in."""
        self.grid.join(other.grid)
        join_rows(self.cache, other.cache)

    def tidy(self) -> None:
        """Let those go who are leaving, and columns that hold much less than they could; none may be empty between
        tokens where a window counts them."""
        grid, rest = self.grid, None
        for slot in self.leaving:
            stay = grid.free(slot)
            rest = stay if rest is None else rest[stay]
        if rest is not None:
            self.cache.batch_select_indices(rest)
        if not self.leaving and not self.changed:
            return
        between, self.leaving, self.changed = self.changed, [], False
        dead = grid.dead()
        if dead > COMPACT_ABOVE * grid.columns or (dead and grid.batch == 1) or (between and self.sliding):
            gather_columns(self.cache, grid.pack(dead))
        grid.padded = not bool(grid.mask[:, : grid.columns].all())
