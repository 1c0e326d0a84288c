"""llama.cpp under the decode loop: numbered sequences of one context, and the engine on top of them.

Every sequence has positions of its own, so that there is no padding and there are no masks. A cell of the context holds
one token of one sequence, or of several that begin alike.

Weights that are not F32 or F16 are multiplied by other code for one token than for several: there a row of a batch, or
a text that is fed in other pieces, differs from the same one alone in the last digits.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import InputError
from ...models.llamacpp.bindings import F32
from ...models.llamacpp.model import LlamaCppModel, Weights
from .branches import Branches, Drafted, Entry
from .resting import Rest, Resting, longest_beginning

__all__ = ["LlamaCppEngine", "Sequences", "SharedSequences"]

BLOCK = 512  # tokens of one call of llama.cpp
MOST_SEQUENCES = 256  # that llama.cpp has
LEAST = 16  # tokens that a text must have in common with another one to begin as that
COPIED = 64  # tokens whose cells are copied in the time in which one is read, or more
ROOM = 256  # cells that a new engine has for each row beyond its prompt


class Sequences:
    """The sequences of one context, which are numbered, come and go, and share its cells.

    Not for two threads at a time; several of them on one model are.

    Args:
        model: see `tokenry.load("model.gguf")`.
        sequences: how many there can be at a time, up to 256.
        cells: tokens of all sequences together; default: the model's context for each of them.

    Attributes:
        cells: how many there are, which llama.cpp rounds up.
        lengths: {number of a sequence: its tokens}.
        common: (sequences, sequences), how many first cells two of them share; its diagonal means nothing.
        shared: cells in use beside these, by branches of a sequence.
    """

    def __init__(self, model: LlamaCppModel, sequences: int = 1, cells: int | None = None) -> None:
        if not 1 <= sequences <= MOST_SEQUENCES:
            raise InputError(f"{sequences} sequences are not possible; llama.cpp has 1 to {MOST_SEQUENCES}")
        self.model, self.sequences = model, sequences
        self.window: int = model.config.max_position_embeddings
        self.vocabulary = model.weights.vocabulary
        self.ffi, self.lib = model.weights.library.ffi, model.weights.library.lib
        self.context = self._open(self.window * sequences if cells is None else cells)
        self.memory = self.lib.llama_get_memory(self.context)
        self.cells: int = self.lib.llama_n_ctx(self.context)
        self.batch = self.lib.llama_batch_init(BLOCK, 0, sequences)
        weakref.finalize(self, _close, model.weights, self.context, self.batch)
        self.lengths: dict[int, int] = {}
        self.common = np.zeros((sequences, sequences), dtype=int)
        self.branched: set[int] = set()  # numbers that branches of others have
        self.shared = 0

    def _open(self, cells: int) -> Any:
        weights, options = self.model.weights, self.lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = cells, BLOCK, BLOCK, self.sequences
        options.n_threads = options.n_threads_batch = weights.threads
        options.type_k = options.type_v = weights.precision
        if weights.precision == F32:
            options.flash_attn_type = 0  # which would compute with half of that
        options.kv_unified = options.swa_full = options.no_perf = True  # a window that forgets could not be rewound
        context = self.lib.llama_init_from_model(weights.pointer, options)
        if context == self.ffi.NULL:
            raise InputError(
                f"llama.cpp has no memory for {cells} tokens of {self.sequences} sequences; give a smaller context"
            )
        return context

    # --- room ----------------------------------------------------------------------------------------------

    @property
    def room(self) -> int:
        """How many more tokens fit, of all sequences together."""
        return self.cells - self.held - self.shared

    @property
    def held(self) -> int:
        """Cells of all sequences: each adds what it shares with none of those before it."""
        slots = list(self.lengths)
        before = np.tril(self.common[slots][:, slots], -1)
        return sum(self.lengths.values()) - int(before.max(1, initial=0).sum())

    @property
    def free_slots(self) -> int:
        """How many more sequences can join."""
        return self.sequences - len(self.lengths) - len(self.branched)

    def room_of(self, slot: int) -> int:
        """How many more tokens one sequence can have."""
        return min(self.room, self.window - self.lengths[slot])

    # --- sequences -----------------------------------------------------------------------------------------

    def join(self) -> int:
        """The number of a new sequence, which is empty.

        Raises:
            InputError: all are taken.
        """
        slot = self._unused()
        self.lengths[slot] = 0
        return slot

    def forward(self, blocks: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """As `forward_all`, by sequence."""
        return dict(zip(blocks, self.forward_all(blocks)))

    def forward_all(self, blocks: Mapping[int, Sequence[int]]) -> Tensor:
        """Feed the new tokens of each sequence; float32 logits (blocks, vocabulary) after the last one of each.

        Raises:
            InputError: no such sequence, no such token, or too many of them; then nothing has been fed.
        """
        self._check(blocks)
        entries = []
        for slot, tokens in blocks.items():
            start, last = self.lengths[slot], len(tokens) - 1
            entries += [Entry(token, start + i, (slot,), i == last) for i, token in enumerate(tokens)]
        logits = self.feed(entries)
        for slot, tokens in blocks.items():
            self.lengths[slot] += len(tokens)
        return logits

    def rollback(self, slot: int, count: int) -> None:
        """Take back the last `count` tokens of a sequence."""
        length = self._length(slot) - count
        if not 0 <= length <= self.lengths[slot]:
            raise InputError(
                f"{count} tokens cannot be taken back from sequence {slot}; give 0 to {self.lengths[slot]}"
            )
        if count:
            self._shorten(slot, length)

    def free(self, slot: int) -> None:
        """The sequence is over: its number is for others, and so are the cells that no other one shares."""
        self._length(slot)
        self._shorten(slot, 0)
        del self.lengths[slot]

    def _shorten(self, slot: int, length: int) -> None:
        self.cut(slot, length)
        self.lengths[slot] = length
        self._share(slot, np.minimum(self.common[slot], length))

    def _share(self, slot: int, common: np.ndarray) -> None:
        self.common[slot] = self.common[:, slot] = common

    # --- beginnings ----------------------------------------------------------------------------------------

    def begin_as(self, slot: int, other: int, stop: int) -> None:
        """Let a sequence, which has nothing there, begin with `stop` tokens of another one, in the same cells."""
        self.lib.llama_memory_seq_cp(self.memory, other, slot, 0, stop)
        self.lengths[slot] = max(self.lengths[slot], stop)
        self._check_length(slot, self.lengths[slot])
        common = np.minimum(self.common[other], stop)
        common[other] = stop
        self._share(slot, common)

    def saved(self, slot: int) -> np.ndarray:
        """All that is held of a sequence, bit for bit, as bytes."""
        size = self.lib.llama_state_seq_get_size(self.context, slot)
        state = np.empty(size, dtype=np.uint8)
        self.lib.llama_state_seq_get_data(self.context, self.ffi.from_buffer("uint8_t[]", state), size, slot)
        return state

    def restore(self, slot: int, state: np.ndarray, length: int) -> None:
        """Let an empty sequence be what was saved of one with `length` tokens; there must be room."""
        data = self.ffi.from_buffer("uint8_t[]", state)
        if not self.lib.llama_state_seq_set_data(self.context, data, len(state), slot):
            raise RuntimeError(f"llama.cpp cannot take over {length} tokens of a sequence ({self._said()})")
        self._check_length(slot, length)
        self.lengths[slot] = length

    def with_room(self, count: int, sequences: int = 0) -> Sequences:
        """Itself, or the same sequences in a context with room for so many more tokens, and for so many sequences."""
        if count <= self.room and sequences <= self.sequences:
            return self
        held = self.cells - self.room
        cells = self.cells if count <= self.room else 2 * (held + count)
        return self._grown(max(self.sequences, sequences), cells)

    def _grown(self, sequences: int, cells: int) -> Sequences:
        """A larger context with the same sequences in it, bit for bit; this one is over. There must be no branches."""
        other = Sequences(self.model, sequences, cells)
        for slot, length in self.lengths.items():
            nearest = max(other.lengths, key=lambda one: self.common[slot, one], default=slot)
            stop = int(self.common[slot, nearest]) if other.lengths else 0
            other.lengths[slot] = 0
            if stop:  # these tokens are there already
                self.lib.llama_memory_seq_rm(self.memory, slot, 0, stop)
            if stop < length:
                other.restore(slot, self.saved(slot), length)
            if stop:
                other.begin_as(slot, nearest, stop)
        return other

    # --- for branches --------------------------------------------------------------------------------------

    def branch(self, slot: int, stop: int) -> int:
        """The number of a sequence that shares the first `stop` tokens of another one."""
        new = self._unused()
        self.branched.add(new)
        self.lib.llama_memory_seq_cp(self.memory, slot, new, 0, stop)
        return new

    def adopt(self, slot: int, branch: int, stop: int) -> None:
        """Let a sequence have what a branch of it has, up to `stop`."""
        start = self.lengths[slot]
        self.cut(slot, start)
        self.lib.llama_memory_seq_cp(self.memory, branch, slot, start, stop)
        self._check_length(slot, stop)

    def drop(self, branches: Iterable[int]) -> None:
        """These branches are over."""
        for branch in branches:
            self.cut(branch, 0)
            self.branched.discard(branch)

    def cut(self, slot: int, length: int) -> None:
        """Remove what a sequence has from `length` on."""
        self.lib.llama_memory_seq_rm(self.memory, slot, length, -1)
        self._check_length(slot, length)

    def _check_length(self, slot: int, length: int) -> None:
        """A cache may report success and have lost everything."""
        held = self.lib.llama_memory_seq_pos_max(self.memory, slot) + 1
        if held != length:
            raise RuntimeError(f"llama.cpp holds {held} tokens of a sequence instead of {length}, so it cannot go on")

    def feed(self, entries: Sequence[Entry]) -> Tensor:
        """Feed tokens in blocks that llama.cpp can take; logits (wanted, vocabulary).

        If that fails, what was there before is as it was.
        """
        parts = []
        for start in range(0, len(entries), BLOCK):
            code, logits = self._feed(entries[start : start + BLOCK])
            if code:
                for slot in {slot for entry in entries for slot in entry.slots}:
                    self.cut(slot, min(entry.position for entry in entries if slot in entry.slots))
                raise RuntimeError(f"llama.cpp could not go on (code {code}: {self._said()})")
            parts.append(logits)
        return torch.from_numpy(np.concatenate(parts)) if len(parts) > 1 else torch.from_numpy(parts[0])

    def _feed(self, entries: Sequence[Entry]) -> tuple[int, np.ndarray]:
        batch, wanted = self.batch, 0
        batch.n_tokens = len(entries)
        for i, (token, position, slots, wants) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, len(slots), wants
            wanted += wants
            for j, slot in enumerate(slots):
                batch.seq_id[i][j] = slot
        code = self.lib.llama_decode(self.context, batch)
        shape = (0 if code else wanted, self.vocabulary)
        rows = np.empty(shape, dtype=np.float32)
        if rows.size:
            self.ffi.memmove(self.ffi.from_buffer(rows), self.lib.llama_get_logits(self.context), rows.nbytes)
        return code, rows

    # --- small pieces --------------------------------------------------------------------------------------

    def _unused(self) -> int:
        taken = self.lengths.keys() | self.branched
        slot = next((slot for slot in range(self.sequences) if slot not in taken), None)
        if slot is None:
            raise InputError(f"all {self.sequences} sequences are taken; free one first, or open more")
        return slot

    def _length(self, slot: int) -> int:
        if slot not in self.lengths:
            raise InputError(f"there is no sequence {slot}; {sorted(self.lengths)} have joined")
        return self.lengths[slot]

    def _check(self, blocks: Mapping[int, Sequence[int]]) -> None:
        for slot, tokens in blocks.items():
            length = self._length(slot)
            if not tokens:
                raise InputError(f"sequence {slot} has no new tokens; leave it out")
            if not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
                raise InputError(
                    f"tokens run from {min(tokens)} to {max(tokens)}; this model has 0 to {self.vocabulary - 1}"
                )
            if length + len(tokens) > self.window:
                raise InputError(
                    f"sequence {slot} would come to {length + len(tokens)} tokens, and the context has {self.window}; "
                    "shorten it, or load the model with a larger context"
                )
        count = sum(map(len, blocks.values()))
        if count > self.room:
            raise InputError(
                f"{count} tokens do not fit into the cache, which has room for {self.room} of {self.cells}; free a "
                "sequence, or open more cells"
            )

    def _said(self) -> str:
        return "; ".join(self.model.weights.library.warnings) or "no more is said"


class SharedSequences:
    """A `SharedEngine` on a GGUF file: a context that grows with the texts that are in it.

    A text that begins like one that is being written has the same cells. One that is over rests outside of the context,
    where it takes no cells: every step of the others would go over them.

    Args:
        sequences: how many texts there can be at a time.
        memory: bytes that texts may take that are over; 0: every prompt is read anew.
    """

    def __init__(self, model: LlamaCppModel, sequences: int, memory: int = 0) -> None:
        self.pool = Sequences(model, sequences, min(model.config.max_position_embeddings, ROOM * sequences))
        self.resting: Resting[np.ndarray] = Resting(memory)
        self.texts: dict[int, array[int]] = {}
        self.sure = True  # that every sequence holds what it was fed

    @property
    def begins_anywhere(self) -> bool:
        return self.resting.memory > 0

    def join(self) -> int:
        slot = self.pool.join()
        self.texts[slot] = array("i")
        return slot

    def begin(self, slot: int, prompt: Sequence[int]) -> int:
        if not self.begins_anywhere:
            return 0
        ids = np.array(prompt)
        other, count = longest_beginning(self.texts, ids)
        number, resting = self.resting.longest(ids)
        if number is not None and resting >= count + LEAST and self._restored(slot, number, resting, len(prompt)):
            count = resting
        elif other is not None and count >= LEAST:
            self.pool.begin_as(slot, other, count)
        else:
            return 0
        self.texts[slot].extend(prompt[:count])
        return count

    def _restored(self, slot: int, number: int, count: int, length: int) -> bool:
        """Let a sequence begin with what rests; not if that takes longer than reading, or if the context would grow for
        tokens that the prompt does not have."""
        tokens = self.resting.rests[number].tokens
        if len(tokens) > min(COPIED * count, max(self.pool.room, length)):
            return False
        self.pool = self.pool.with_room(len(tokens))
        self.pool.restore(slot, self.resting.use(number).state, len(tokens))
        self.pool.rollback(slot, len(tokens) - count)
        return True

    def forward(self, blocks: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        self.sure = False
        self.pool = self.pool.with_room(sum(map(len, blocks.values())))
        logits = self.pool.forward(blocks)
        for slot, tokens in blocks.items():
            self.texts[slot].extend(tokens)
        self.sure = True
        return logits

    def rollback(self, slot: int, count: int) -> None:
        self.pool.rollback(slot, count)
        del self.texts[slot][len(self.texts[slot]) - count :]

    def free(self, slot: int) -> None:
        tokens = np.array(self.texts.pop(slot))
        try:
            if self.sure and self.resting.wants(tokens):
                state = self.pool.saved(slot)
                self.resting.add(Rest(tokens, state, len(state)))
        finally:
            self.pool.free(slot)

    def resting_bytes(self) -> int:
        return self.resting.size


def _close(weights: Weights, context: Any, batch: Any) -> None:
    """Free a context; the weights are held until then."""
    weights.library.lib.llama_free(context)
    weights.library.lib.llama_batch_free(batch)


class LlamaCppEngine:
    """The decode loop's `Engine` for a GGUF file; takes draft trees, too.

    It begins with a small context and moves to larger ones as the texts grow.

    Args:
        model: see `tokenry.load("model.gguf")`.
        max_new_tokens: how many tokens follow a prompt at most, where that is known.
    """

    cache = None
    pool: Sequences  # one for each row, from the prompt on

    def __init__(self, model: LlamaCppModel, max_new_tokens: int | None = None) -> None:
        self.model, self.new = model, ROOM if max_new_tokens is None else min(ROOM, max_new_tokens)
        self.calls = self.tokens_processed = 0
        self.trees: dict[int, Branches] = {}  # of each row, while they wait for `commit`
        self.blocks: list[tuple[Tensor, Tensor, np.ndarray]] = []  # what was fed of them

    @property
    def columns(self) -> int:
        """How many tokens it holds."""
        return sum(self.pool.lengths.values()) if self.calls else 0

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        rows = _rows(tokens, mask)
        if not self.calls:
            self._open(rows)
        blocks = {row: ids for row, ids in enumerate(rows) if ids and row in self.pool.lengths}
        count = sum(map(len, blocks.values()))
        self.pool = self.pool.with_room(count)
        found = self.pool.forward_all(blocks)
        self._count(count)
        if len(blocks) == len(rows):
            return found
        return found.new_zeros(len(rows), self.pool.vocabulary).index_copy_(0, torch.tensor([*blocks]), found)

    def rollback(self, row: int, count: int) -> None:
        if count:
            self.pool.rollback(row, count)

    def free(self, row: int) -> None:
        if row in self.trees:
            self.trees.pop(row).close(())
        if row in self.pool.lengths:
            self.pool.free(row)

    def _open(self, rows: Sequence[Sequence[int]]) -> None:
        cells = sum(min(len(ids) + self.new, self.model.config.max_position_embeddings) for ids in rows)
        self.pool = Sequences(self.model, len(rows), cells)
        for _ in rows:
            self.pool.join()

    def _count(self, tokens: int) -> None:
        self.calls += 1
        self.tokens_processed += tokens

    # --- trees ---------------------------------------------------------------------------------------------

    def check_tree(self) -> None:
        """Every model that llama.cpp runs here takes draft trees."""

    def forward_tree(self, tokens: Tensor, mask: Tensor, parents: np.ndarray) -> Tensor:
        """As `TransformersEngine.forward_tree`."""
        first = sum(block.shape[1] for block, *_ in self.blocks)
        blocks = {row: block for row, block in self._drafted(tokens, mask, parents, first).items() if block}
        trees = {row: self.trees.get(row) or Branches(self.pool, row) for row in blocks}
        sequences = sum(tree.needed(blocks[row]) for row, tree in trees.items())
        count = sum(map(len, blocks.values()))
        if count > self.pool.room or sequences > self.pool.free_slots:
            return self._fed_again(tokens, mask, parents, count, sequences)
        self.trees |= trees
        self.blocks.append((tokens, mask, parents))
        found = self.pool.feed([entry for row, tree in trees.items() for entry in tree.add(blocks[row])])
        self._count(count)
        places = [(row, token.column - first) for row, block in blocks.items() for token in block]
        if len(places) == tokens.numel():
            return found.view(*tokens.shape, -1)
        logits = found.new_zeros(*tokens.shape, self.pool.vocabulary)
        logits[tuple(torch.tensor(places).T)] = found
        return logits

    def commit(self, kept: Sequence[Sequence[int]]) -> None:
        """As `TransformersEngine.commit`."""
        for row, tree in self.trees.items():
            tree.close(kept[row])
        self.trees, self.blocks = {}, []

    def _drafted(self, tokens: Tensor, mask: Tensor, parents: np.ndarray, first: int) -> dict[int, list[Drafted]]:
        """The tokens of a block whose first column is the open column `first`, by row."""
        ids, shown = tokens.tolist(), mask.tolist()
        return {
            row: [
                Drafted(first + i, token, int(parents[row, i]))
                for i, (token, live) in enumerate(zip(ids[row], shown[row]))
                if live
            ]
            for row in self.pool.lengths
        }

    def _fed_again(self, tokens: Tensor, mask: Tensor, parents: np.ndarray, count: int, sequences: int) -> Tensor:
        """Move to a larger context, and feed what is open there again, together with a new block."""
        blocks, open_tokens = [*self.blocks, (tokens, mask, parents)], self.pool.shared
        sequences += self.pool.sequences - self.pool.free_slots
        if sequences > MOST_SEQUENCES:
            raise InputError(
                f"these draft trees take {sequences} sequences, and llama.cpp has {MOST_SEQUENCES}; give fewer prompts "
                "at a time, or a smaller num_drafts"
            )
        self.commit([()] * len(tokens))
        self.pool = self.pool.with_room(open_tokens + count, min(2 * sequences, MOST_SEQUENCES))
        ids, shown = torch.cat([ids for ids, *_ in blocks], 1), torch.cat([shown for _, shown, _ in blocks], 1)
        return self.forward_tree(ids, shown, np.concatenate([one for *_, one in blocks], 1))[:, -tokens.shape[1] :]


def _rows(tokens: Tensor, mask: Tensor | None) -> list[list[int]]:
    """The tokens of each row, without padding."""
    rows = tokens.tolist()
    if mask is None:
        return rows
    return [[token for token, live in zip(ids, shown) if live] for ids, shown in zip(rows, mask.tolist())]
