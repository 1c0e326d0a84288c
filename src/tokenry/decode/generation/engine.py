"""The seam between the decode loop and a model: feed tokens, get rows of logits, take tokens back.

The loop knows nothing about caches, masks or positions. `TransformersEngine` keeps them for a
`PreTrainedModel`; another engine needs only what `Engine` lists. Draft trees need `forward_tree` and `commit` as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

from ...core.errors import InputError
from ...models.kv_cache import (
    forward_arguments,
    gather_columns,
    held_columns,
    is_sliding,
    keep_of_last,
    later_inputs,
    layer_lengths,
    new_cache,
    remove_last,
    rewind_obstacle,
    state_argument,
)
from ...models.masks import tree_mask
from ...models.positions import position_obstacle
from .grid import Grid, OpenColumns
from .layer_policy import ExecutedLayers, LayerPolicy

__all__ = ["Engine", "TransformersEngine", "TreeEngine"]

COMPACT_ABOVE = 0.25  # share of dead columns at which a batch is compacted


class Engine(Protocol):
    """What the decode loop needs from a model.

    `calls` counts forward passes and `tokens_processed` tokens fed, padding excluded; `cache` is what it keeps of them,
    for whoever goes on from there, or None.
    """

    calls: int
    tokens_processed: int
    cache: Any

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Feed a block (batch, k), padding where mask is 0; returns the last column's float32 logits (batch, vocab)."""
        ...

    def rollback(self, row: int, count: int) -> None:
        """Take back the last `count` tokens that were fed to `row`."""

    def free(self, row: int) -> None:
        """`row` is over: give back what is held for it. It is fed padding from now on, and its logits mean nothing."""


class TreeEngine(Engine, Protocol):
    """An engine that takes draft trees, see `TransformersEngine`."""

    @property
    def model(self) -> PreTrainedModel: ...

    @property
    def columns(self) -> int:
        """How much it holds."""
        ...

    def check_tree(self) -> None:
        """Refuse what no draft tree can be fed with."""

    def forward_tree(self, tokens: Tensor, mask: Tensor, parents: np.ndarray) -> Tensor:
        """Feed tokens (batch, k) of which several may continue the same one; float32 logits (batch, k, vocab)."""
        ...

    def commit(self, kept: Sequence[Sequence[int]]) -> None:
        """Settle what `forward_tree` has fed: for each row, the columns that are kept."""


class TransformersEngine:
    """Runs a decoder-only `PreTrainedModel` with a growing cache.

    A batch shares columns. A token that is taken back leaves a dead column behind, which the mask hides; for one
    row the cache is cropped instead. Dead columns are gathered away when they exceed a quarter, and at once where a
    sliding window would count them.

    Args:
        cache: the cache to fill (default: a new `DynamicCache`). It may hold the first columns of the prompt; then only
            the rest is fed, where the mask may have padding again (rows whose rest is shorter).
        rewinds: whether `rollback` will be called.
        rewind: "auto" takes tokens out of the cache where it can and feeds the row again where it cannot;
            "reprefill" always feeds again.
        extra: keyword arguments of the first forward only (pixel values and the like).
        max_new_tokens: how many tokens follow the prompt at most, for a layer policy that plans ahead.
    """

    grid: Grid  # what the cache holds, from the prompt on

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache | None = None,
        layer_policy: LayerPolicy | None = None,
        rewinds: bool = False,
        rewind: str = "auto",
        extra: dict[str, Any] | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        if model.config.is_encoder_decoder:
            raise InputError(f"{type(model).__name__} has an encoder; the decode loop takes decoder-only models")
        if rewind not in ("auto", "reprefill"):
            raise InputError(f"rewind={rewind!r} is unknown; use 'auto' or 'reprefill'")
        accepted = forward_arguments(model)
        self.model = model
        self.carrier = state_argument(model)
        self.masks_later = later_inputs(model).get("attention_mask") is not None  # Mamba masks its prompt alone
        self.cache: Any = new_cache(model) if cache is None else cache
        self.layers = None if layer_policy is None else ExecutedLayers(model, layer_policy)
        self.rewinds = rewinds
        self.reprefills = rewind == "reprefill"
        self.extra = extra or {}
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.takes_positions = "position_ids" in accepted
        self.fixed_positions = position_obstacle(model)
        self.max_new_tokens = max_new_tokens
        self.calls = self.tokens_processed = 0
        self.started = False
        self.open: OpenColumns | None = None  # the newest columns, while they wait for `commit`
        self.stale = False  # the cache holds what it should not, so that everything must be fed again

    @property
    def columns(self) -> int:
        """How many columns the cache holds, of tokens and of nothing."""
        return self.grid.columns if self.started else 0

    @property
    def takes_chunks(self) -> bool:
        """Whether a prompt may come in several blocks: all that it leaves behind are keys and values, and nothing is
        there yet."""
        return self.layers is None and not self._rewind_obstacle() and not held_columns(self.cache)

    # --- forward -------------------------------------------------------------------------------------------

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        if not self.started:
            tokens, mask = self._start(tokens, mask)
            if not self.stale:
                newest = self.columns + tokens.shape[1] - 1
                return self._forward(tokens, mask, newest, **self.extra)
        tokens, mask = self.grid.here(tokens), None if mask is None else self.grid.here(mask)
        return self.grid.everywhere(self._feed(tokens, mask))

    def _feed(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        uneven = mask is not None and self.rewinds and is_sliding(self.cache) and _is_uneven(mask)
        if self.stale or (uneven and self.reprefills):
            return self._forward(*self._start_again(tokens, mask))
        if self.layers is None:
            return self._in_parts(tokens, mask) if mask is not None and uneven else self._forward(tokens, mask)
        for i in range(tokens.shape[1]):  # the depth may change from one column to the next
            logits = self._forward(tokens[:, i : i + 1], None if mask is None else mask[:, i : i + 1], self.columns)
        return logits

    def _in_parts(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Feed a block in parts in which each row has tokens or padding alone: padding before a token would take up
        room in its window."""
        cuts = ((mask[:, 1:] != mask[:, :-1]).any(0).nonzero()[:, 0] + 1).tolist()
        for part, shown in zip(tokens.tensor_split(cuts, 1), mask.tensor_split(cuts, 1)):
            logits = self._forward(part, shown)
        return logits

    def _forward(self, tokens: Tensor, mask: Tensor | None, depth_of: int | None = None, **extra: Any) -> Tensor:
        """Feed a block. With a layer policy, the layers that run are those of the column `depth_of`; None: all."""
        grid, start = self.grid, self.columns
        positions, fed = grid.add(tokens, mask)
        inputs: dict[str, Any] = {"input_ids": tokens}
        if self.carrier is not None:
            inputs |= {self.carrier: self.cache, "use_cache": True}
        if grid.padded and (start == 0 or self.masks_later):
            inputs["attention_mask"] = grid.mask[:, : grid.columns].long()
        if self.takes_positions:
            inputs["position_ids"] = positions
        with nullcontext() if self.layers is None or depth_of is None else self.layers.running(depth_of):
            output = self.model(**inputs, **self.last_only, **extra, return_dict=True)
        logits, self.stale = output.logits, self.carrier is None
        if self.carrier is not None and not isinstance(self.cache, Cache):
            self.cache = output[self.carrier]
        if start == 0 and self.rewinds and not self.reprefills and self.carrier is not None:
            self.cache.activate_past_recording()  # sliding layers must keep what a rewind may need
        self._count(fed)
        if start > 0 and mask is not None and self.rewinds and is_sliding(self.cache):
            self._compact()  # padding inside the block would take up room in the windows
        # a copy: for a long prompt the model's own logits would keep a large buffer alive
        return logits[:, -1].to(dtype=torch.float32, copy=True)

    def _count(self, tokens: int) -> None:
        self.calls += 1
        self.tokens_processed += tokens

    def forward_block(self, tokens: Tensor, mask: Tensor, positions: Tensor, count: int) -> Tensor:
        """Feed tokens (1, k) of a single row that stand at `positions` (1, k) and see what `mask` lets them see;
        float32 logits (count, vocab) of the last ones.

        The first block begins with the prompt; what the cache holds of that is not fed again. What should not stay is
        taken back with `rollback`.

        Args:
            mask: (1, 1, k, columns + k), as the model's attention takes it (`tokenry.models.masks.as_attention_mask`).
        """
        extra = {}
        if not self.started:
            tokens, _ = self._start(tokens, None)
            self.check_tree()
            if tokens.shape[1] < count:
                raise InputError(
                    f"the cache holds the whole prompt ({self.columns} columns); leave the last one to feed"
                )
            mask, positions, extra = mask[:, :, -tokens.shape[1] :], positions[:, -tokens.shape[1] :], self.extra
        _, fed = self.grid.add(tokens)
        logits = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **{name: count for name in self.last_only},
            **extra,
        ).logits
        self._count(fed)
        return logits[0, -count:].float()

    # --- rollback ------------------------------------------------------------------------------------------

    def rollback(self, row: int, count: int) -> None:
        if count == 0:
            return
        grid = self.grid
        if self.reprefills or (self.fixed_positions and (grid.batch > 1 or grid.padded)):
            grid.mark_dead(grid.places[row], count)
            self.stale = True
        elif grid.batch == 1 and not grid.padded:
            self._crop(count)
        else:
            grid.mark_dead(grid.places[row], count)
            self._compact()

    def free(self, row: int) -> None:
        """Take a row out of the cache. A cache from which none can be taken keeps it, and it goes along as padding."""
        if not isinstance(self.cache, Cache) or rewind_obstacle(self.cache):
            return
        rest = self.grid.free(row)
        self.cache.batch_select_indices(rest)
        if self.open is not None:
            self.open.take(rest, self.grid.live)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with copies of these rows, numbered anew: what they have read is not read again.

        Raises:
            InputError: a model whose state cannot be copied row by row.
        """
        why = self._rewind_obstacle()
        if why:
            raise InputError(f"rows cannot be copied: {why}; use a model with a dynamic cache of keys and values alone")
        index = torch.tensor(list(rows), dtype=torch.long)
        self.cache.batch_select_indices(index)
        self.grid.select(index)
        self._compact()

    def _crop(self, count: int) -> None:
        new, layers = self.columns - count, len(self.cache.layers)
        columns = range(new, self.columns)
        remove_last(self.cache, [count] * layers if self.layers is None else self.layers.take_back(columns, layers))
        self.grid.shorten(count)

    def _compact(self) -> None:
        """Gather dead columns away, where there are many or a window counts them."""
        dead, sliding = self.grid.dead(), is_sliding(self.cache)
        if not sliding and dead <= COMPACT_ABOVE * self.columns:
            return
        whole = all(
            length in (0, self.columns) or getattr(layer, "is_sliding", False)
            for length, layer in zip(layer_lengths(self.cache), self.cache.layers)
        )
        if self.layers is not None or not whole:
            if sliding:
                raise InputError(
                    "tokens of a batch cannot be taken back when layers hold unequal numbers of columns and some have "
                    "a sliding window; run one prompt at a time"
                )
            return  # the mask alone hides dead columns, which is exact too
        gather_columns(self.cache, self.grid.pack(dead))

    def _start_again(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """All live tokens of every row and the new block, left-padded, for a cache that starts again."""
        if not is_sliding(self.cache) and any(n not in (0, self.columns) for n in layer_lengths(self.cache)):
            raise InputError(
                "a compressed cache cannot be filled again; do not combine rewind='reprefill' with cache compression"
            )
        self.cache, self.stale = new_cache(self.model), False
        return self.grid.start_again(tokens, mask)

    # --- trees ---------------------------------------------------------------------------------------------

    def forward_tree(self, tokens: Tensor, mask: Tensor, parents: np.ndarray) -> Tensor:
        """Feed tokens (batch, k) of which several may continue the same one; float32 logits (batch, k, vocab).

        The columns stay open until `commit` says which of them are kept; until then more may be fed on top of them.

        Args:
            mask: (batch, k), False for padding.
            parents: (batch, k), the open column that each token follows, counted from the first one that is open and
                always an earlier one; -1 for what follows the tokens that are not open.
        """
        grid, new = self.grid, parents.shape[1]
        tokens, mask, parents = grid.here(tokens), grid.here(mask), parents[list(grid.places)]
        opened = self.open
        if opened is None:
            self.check_tree()
        elif is_sliding(self.cache):
            tokens, mask, parents, opened = *self._reopen(opened, tokens, mask, parents), None
        if opened is None:
            opened = self.open = OpenColumns(grid.live)
        settled = grid.mask[:, : self.columns - len(opened)]
        seen, positions = opened.add(parents)
        grid.open(tokens)
        allowed = torch.cat([settled[:, None].expand(-1, parents.shape[1], -1), seen], -1)
        everywhere = torch.cat([settled.long().cumsum(-1) - 1, opened.positions], 1)
        inputs = {"input_ids": tokens, "past_key_values": self.cache, "use_cache": True}
        if self.takes_positions:
            inputs["position_ids"] = positions
        inputs["attention_mask"] = tree_mask(self.model, self.cache, allowed, positions, everywhere)
        logits = self.model(**inputs, return_dict=True).logits
        self._count(int(mask.sum()))
        return grid.everywhere(logits[:, -new:].float())

    def commit(self, kept: Sequence[Sequence[int]]) -> None:
        """Settle the open columns: for each row, those that are kept, in the order of their positions."""
        assert self.open is not None, "there are open columns"
        rows, held, device = [kept[row] for row in self.grid.places], len(self.open), self.grid.tokens.device
        blank = [max(map(len, rows)) - len(row) for row in rows]
        alive = torch.tensor([[0] * n + [1] * len(row) for n, row in zip(blank, rows)], device=device).bool()
        index = torch.tensor([[0] * n + [*row] for n, row in zip(blank, rows)], dtype=torch.long, device=device)
        keep_of_last(self.cache, index, held)
        self.grid.settle(index, alive, held)
        self.open = None
        if not bool(alive.all()):
            self.grid.padded = True
            self._compact()

    def _reopen(
        self, before: OpenColumns, tokens: Tensor, mask: Tensor, parents: np.ndarray
    ) -> tuple[Tensor, Tensor, np.ndarray]:
        """Take the open columns out of the cache and put them in front of the new ones: fed one after the other,
        siblings would fill the windows."""
        held = len(before)
        remove_last(self.cache, [held] * len(self.cache.layers))
        again = self.grid.take_open(held)
        mask = torch.cat([torch.ones_like(again, dtype=mask.dtype), mask], 1)
        return torch.cat([again, tokens], 1), mask, np.concatenate([before.parents, parents], 1)

    def check_tree(self) -> None:
        """Refuse a model, a cache or a layer policy with which no draft tree can be fed.

        Raises:
            InputError: there is one.
        """
        if self.fixed_positions:
            raise InputError(
                f"{self.fixed_positions}, so the branches of a draft tree cannot stand at the same positions; leave "
                "speculation out"
            )
        if self.layers is not None:
            raise InputError("a layer policy thins single columns, and a draft tree needs them whole; use one of them")
        why = self._rewind_obstacle() or ("rewind='reprefill' feeds everything again" if self.reprefills else None)
        if why:
            raise InputError(
                f"drafts are taken back at every step, but {why}; use a dynamic cache of keys and values alone"
            )
        lengths = layer_lengths(self.cache)
        if not is_sliding(self.cache) and any(n not in (0, self.columns) for n in lengths):
            raise InputError(
                f"the layers of the cache hold {min(lengths)} to {max(lengths)} of {self.columns} columns; a draft "
                "tree needs them all, so leave cache compression out"
            )

    # --- the prompt ----------------------------------------------------------------------------------------

    def _start(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Set up for a prompt; returns what of it is still to be fed."""
        self.grid, self.started = Grid(tokens, mask), True
        if self.layers is not None:
            if mask is not None and not bool(mask[:, -1].all()):
                raise InputError("a prompt is padded on the right, where tokens will follow; pad on the left")
            self.layers.policy.begin(tokens.shape[1], self.max_new_tokens)
        if self.rewinds and not self.reprefills:
            obstacle = self._rewind_obstacle()
            if obstacle and "static" in type(self.cache).__name__.lower():
                raise InputError(f"tokens cannot be taken back: {obstacle}; use the default dynamic cache")
            self.reprefills = obstacle is not None
        if self.rewinds and len(tokens) > 1 and (self.reprefills or self.fixed_positions):
            check_padding(self.model)
        if self.layers is not None and self.reprefills:
            raise InputError(
                "rows cannot be fed again when columns run different layers; use rewind='auto' and the default cache "
                "with a layer policy"
            )
        held = held_columns(self.cache)
        return self._adopt(tokens, mask, held) if held else (tokens, mask)

    def _rewind_obstacle(self) -> str | None:
        if self.carrier is None:
            return f"{type(self.model).__name__} keeps no cache"
        if not isinstance(self.cache, Cache) or not cast(Any, self.model)._supports_default_dynamic_cache():
            return f"{type(self.model).__name__} makes a cache of its own"
        return rewind_obstacle(self.cache)

    def _adopt(self, tokens: Tensor, mask: Tensor | None, held: int) -> tuple[Tensor, Tensor | None]:
        """The cache holds the first columns of the prompt already: take them over and return the rest."""
        lengths = [layer.get_seq_length() for layer in self.cache.layers if hasattr(layer, "get_seq_length")]
        rows = next(keys.shape[0] for layer in self.cache.layers if (keys := getattr(layer, "keys", None)) is not None)
        if held >= tokens.shape[1] or rows != len(tokens):
            raise InputError(
                f"the cache holds {held} columns of {rows} rows, the prompt has {tokens.shape[1]} of {len(tokens)}; "
                "pass the whole prompt, and a cache of its first columns that leaves at least the last one to feed"
            )
        if not is_sliding(self.cache) and any(n not in (0, held) for n in lengths):
            raise InputError(
                f"the layers of the cache hold {min(lengths)} to {max(lengths)} columns; pass an empty one"
            )
        self.grid.adopt(tokens[:, :held], None if mask is None else mask[:, :held])
        if self.rewinds and not self.reprefills:
            self.cache.activate_past_recording()
        tokens, mask = tokens[:, held:], None if mask is None else mask[:, held:]
        # padding between cache and block would take up room in the windows: feed all of it again, left-padded
        self.stale = mask is not None and not bool(mask.all()) and is_sliding(self.cache)
        return tokens, mask


def _is_uneven(mask: Tensor) -> bool:
    """Whether a row of a block has padding and tokens."""
    return bool((mask.any(1) & ~mask.all(1)).any())


@torch.no_grad()
def check_padding(model: PreTrainedModel) -> None:
    """Refuse a model that computes something else for a text with padding before it. Asked once for every model.

    Raises:
        InputError: it does.
    """
    if model not in _SHIFTED:
        text = torch.arange(5, device=model.device)[None] % model.config.get_text_config().vocab_size
        found = []
        for blank in (0, 3):
            engine, mask = TransformersEngine(model), torch.ones(1, 4 + blank, device=text.device)
            mask[:, :blank] = 0
            engine.forward(pad(text[:, :4], (blank, 0)), mask.bool())
            found.append(engine.forward(text[:, 4:]))
        alone, behind = found
        _SHIFTED[model] = bool((alone - behind).abs().max() > 0.01 * alone.abs().max())
    if _SHIFTED[model]:
        raise InputError(
            f"padding before a text changes what {type(model).__name__} computes, so the rows of a batch cannot be fed "
            "again by themselves; run one prompt at a time"
        )


_SHIFTED: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()
