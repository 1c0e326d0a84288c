"""One model under many generations that begin and end at any time: each has a slot, and all are fed in one forward.

A slot is written by a `DecodeLoop` of one row, through a `Slot`; whoever owns the engine may also drive many such loops
together:

    blocks = {slot: the tokens that its loop has pending}
    for slot, logits in engine.forward(blocks).items(): ...
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ...core.errors import InputError
from ...models.batch import left_padded
from ...models.kv_cache import (
    beginning_of,
    cache_bytes,
    forward_arguments,
    gather_columns,
    is_sliding,
    join_rows,
    narrowest_window,
    new_cache,
    remove_last,
    rewind_obstacle,
    row_of,
    shallow_copy,
    state_argument,
)
from ...models.positions import position_obstacle, stretched_positions
from ..generation.engine import check_padding
from ..generation.grid import Grid
from .resting import LEAST, Rest, Resting, longest_beginning, pays

__all__ = ["CountsBytes", "SharedEngine", "SharedTransformersEngine", "Slot", "sharing_obstacle"]

COMPACT_ABOVE = 0.25  # share of dead columns at which a batch is compacted
WASTE = 2  # texts come together while that makes their cells at most so many times as many ...
FREE_COLUMNS = 256  # ... besides as many columns each


class SharedEngine(Protocol):
    """A model that writes several texts, each in a slot of its own. Only one thread may use it."""

    @property
    def begins_anywhere(self) -> bool:
        """Whether a text can begin with what is being read for another one, wherever the two part."""
        ...

    def join(self) -> int:
        """A new, empty slot."""
        ...

    def begin(self, slot: int, prompt: Sequence[int]) -> int:
        """Let an empty slot have what is held of the beginning of its prompt for other texts: returns how many tokens
        that is. The others, at least the last one, are to be fed."""
        ...

    def forward(self, blocks: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Feed each of these slots its new tokens; returns its float32 logits (vocabulary,) after the last one."""
        ...

    def rollback(self, slot: int, count: int) -> None:
        """Take back the last `count` tokens that were fed to a slot."""

    def free(self, slot: int) -> None:
        """A text is over: give back what is held for it. The slot is no more."""

    def resting_bytes(self) -> int:
        """What is held of texts that are over, for new ones that may begin like them."""
        ...


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

    def begin(self, prompt: Sequence[int]) -> int:
        """Join; returns how many tokens of the prompt need not be fed."""
        self.number = self.shared.join()
        return self.shared.begin(self.number, prompt)

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

    A text that is over rests, and a new one with a long beginning of it goes on from there. If it is of one that is
    being written, that is copied first.

    Args:
        memory: bytes that texts may take that are over; 0: every prompt is read anew.

    Raises:
        InputError: a model whose cache cannot be put together, see `sharing_obstacle`.
    """

    def __init__(self, model: PreTrainedModel, memory: int = 0) -> None:
        obstacle = sharing_obstacle(model)
        if obstacle:
            raise InputError(f"texts cannot share a batch: {obstacle}; give each an engine of its own")
        self.model = model
        self.window = narrowest_window(_new_cache(model))
        self.batches: list[_Batch] = []
        self.places: dict[int, _Batch | None] = {}  # None: nothing was fed yet
        self.texts: dict[int, _Text] = {}
        self.resting: Resting[_Held] = Resting(memory)
        self.sure = True  # that every text holds what it was fed
        self.count = self.calls = 0

    @property
    def begins_anywhere(self) -> bool:
        return self.resting.memory > 0 and self.window is None

    def join(self) -> int:
        self.count += 1
        self.places[self.count], self.texts[self.count] = None, _Text(array("i"))
        return self.count

    def begin(self, slot: int, prompt: Sequence[int]) -> int:
        found = self._beginning(np.array(prompt)) if self.resting.memory else None
        if found is None:
            return 0
        rest, count = found
        self.texts[slot] = _Text(array("i", prompt[:count]), rest.state.since, rest)
        return count

    def _beginning(self, prompt: np.ndarray) -> tuple[Rest[_Held], int] | None:
        """What rests, and how many tokens of a prompt that begins with. What is being written is copied for that."""
        running = {slot: self.texts[slot].tokens for slot, batch in self.places.items() if batch}
        slot, shared = longest_beginning(running, prompt)
        number, count = self.resting.longest(prompt)
        if slot is not None and shared >= max(count + LEAST, self.texts[slot].since) and pays(shared, len(prompt)):
            return self._copied(slot, shared), shared
        if number is None or count < self.resting.rests[number].state.since or not pays(count, len(prompt)):
            return None
        return self.resting.use(number), count

    def _copied(self, slot: int, count: int) -> Rest[_Held]:
        """The first tokens of a text, which rest from now on."""
        text, batch = self.texts[slot], self.places[slot]
        assert batch is not None, "it was fed"
        cache = batch.copy_of(slot, count)
        rest = Rest(np.array(text.tokens[:count]), _Held(cache, text.since), cache_bytes(cache))
        self.resting.add(rest)
        return rest

    @torch.no_grad()
    def forward(self, blocks: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        self.sure = False
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
        for slot, block in blocks.items():
            self.texts[slot].tokens.extend(block)
        self.sure = True
        return logits

    def rollback(self, slot: int, count: int) -> None:
        batch, tokens = self.places[slot], self.texts[slot].tokens
        del tokens[len(tokens) - count :]
        if count and batch is not None:
            batch.rollback(slot, count)

    def free(self, slot: int) -> None:
        tokens, batch = self.texts[slot].tokens, self.places[slot]
        try:
            if batch is not None and self.sure and self.resting.wants(tokens):
                self._copied(slot, len(tokens))
        finally:
            del self.texts[slot], self.places[slot]
            if batch is not None:
                batch.leaving.append(slot)
                self.batches = [batch for batch in self.batches if batch.slots]

    def cache_bytes(self) -> int:
        return sum(cache_bytes(batch.cache) for batch in self.batches)

    def resting_bytes(self) -> int:
        return self.resting.size

    # --- who is fed with whom ------------------------------------------------------------------------------

    def _add(self, batch: _Batch) -> None:
        self.batches.append(batch)
        self.places |= dict.fromkeys(batch.slots, batch)

    def _begin(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """New batches for first blocks behind one beginning, of which the longest has at most twice the tokens of the
        shortest."""
        groups: list[list[int]] = []
        for slot in sorted(prompts, key=lambda slot: (*self.texts[slot].start, len(prompts[slot]))):
            if not groups or not self._go_together(groups[-1][0], slot, prompts):
                groups.append([])
            groups[-1].append(slot)
        for group in groups:
            self._add(_Batch.begun(self.model, group, self.texts[group[0]]))
        for slot, prompt in prompts.items():
            self.texts[slot].begin(len(prompt), self.window)

    def _go_together(self, first: int, slot: int, prompts: Mapping[int, Sequence[int]]) -> bool:
        """Whether two first blocks, the shorter one first, are fed together."""
        one, other = self.texts[first], self.texts[slot]
        # there is padding between tokens otherwise, which a window would count
        exact = self.window is None or one.after is None or len(prompts[first]) == len(prompts[slot])
        return one.start == other.start and exact and len(prompts[slot]) <= 2 * len(prompts[first])

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


def _new_cache(model: PreTrainedModel) -> Cache:
    cache = new_cache(model)
    assert cache is not None, "the engine has asked for what stands against it"
    return cache


class _Held(NamedTuple):
    """What is computed of a text that rests."""

    cache: Cache
    since: int  # see `_Text`


@dataclass
class _Text:
    """What is known of a text.

    Attributes:
        tokens: what it was fed.
        since: with fewer tokens it was not seen by windows as they are now: they have lost what lies before the first
            block.
        after: what rests and it begins like, until its own first block is fed.
    """

    tokens: array[int]
    since: int = 0
    after: Rest[_Held] | None = None

    @property
    def start(self) -> tuple[int, int]:
        """The same for texts that go on from the same place."""
        return id(self.after), len(self.tokens)

    def begin(self, count: int, window: int | None) -> None:
        """Its first block, with so many tokens, is about to be fed."""
        if self.after is None and window is not None and count >= window:
            self.since = count
        self.after = None


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
    def begun(cls, model: PreTrainedModel, slots: Sequence[int], text: _Text) -> _Batch:
        """Texts that all have the tokens of this one until now, perhaps none."""
        ids = torch.tensor(list(text.tokens), dtype=torch.long, device=model.device).expand(len(slots), -1)
        if text.after is None:
            cache = _new_cache(model)
        else:
            dropped = len(text.after.tokens) - len(text.tokens)
            cache = beginning_of(text.after.state.cache, dropped, len(slots))
        grid = Grid(ids, None)
        grid.adopt(ids, None)
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

    def copy_of(self, slot: int, count: int) -> Cache:
        """A cache with the first `count` tokens of a text, side by side."""
        place = self.grid.places[slot]
        cache = row_of(self.cache, place) if self.grid.batch > 1 else shallow_copy(self.cache)
        if count < self.grid.columns:
            gather_columns(cache, self.grid.mask[place, : self.grid.columns].nonzero().T[:, :count])
        return cache

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
