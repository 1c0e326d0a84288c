"""The seam between the decode loop and a model: feed tokens, get rows of logits, take tokens back.

The loop knows nothing about caches, masks or positions. `TransformersEngine` keeps them for a
`PreTrainedModel`; another engine needs only what `Engine` lists. Draft trees need `forward_tree` and `commit` as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ...core.errors import InputError
from ...hooks.layers import LayerSwitch
from ...models.anatomy import decoder_layers
from ...models.kv_cache import (
    forward_arguments,
    gather_columns,
    held_columns,
    is_sliding,
    keep_of_last,
    layer_lengths,
    new_cache,
    remove_last,
    rewind_obstacle,
    state_argument,
)
from ...models.masks import tree_mask

__all__ = ["Engine", "LayerPolicy", "TransformersEngine", "layers_needed"]

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

    def rollback(self, row: int, count: int) -> None:
        """Take back the last `count` tokens that were fed to `row`."""

    def free(self, row: int) -> None:
        """`row` is over: give back what is held for it. It is fed padding from now on, and its logits mean nothing."""


class LayerPolicy(Protocol):
    """Which decoder layers run, as a function of the column alone. Sets only shrink and contain layer 0.

    Then every layer has seen all earlier columns of those that it runs for, and the cache needs no repair.
    """

    def begin(self, prompt_columns: int, new_columns: int | None) -> None:
        """Called once, before the prompt is fed, with the most columns that may follow it (None: not known)."""

    def layers(self, column: int) -> Collection[int]:
        """The layers executed for this column; the whole prompt runs those of its last column."""


def layers_needed(model: PreTrainedModel) -> frozenset[int]:
    """The layers that may never be skipped: masks and positions are sized from the first one of every attention kind.

    Raises:
        InputError: a later layer reads the keys and values of an earlier one, which skipping would leave without.
    """
    config = model.config.get_text_config()
    if getattr(config, "num_kv_shared_layers", 0):
        raise InputError(
            f"{config.num_kv_shared_layers} layers of {type(model).__name__} share keys and values, so none can be "
            "skipped; use a model without shared layers"
        )
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return frozenset(kinds.index(kind) for kind in set(kinds))


def position_obstacle(model: PreTrainedModel) -> str | None:
    """Why a token's position is the number of its column, whatever one says; None if it is not."""
    name, config = type(model).__name__, model.config.get_text_config()
    if "position_ids" not in forward_arguments(model):
        return f"{name} takes no position_ids"
    if getattr(config, "alibi", False):
        return f"{name} has ALiBi, which counts columns"
    if "local" in getattr(config, "attention_layers", ()):
        return f"{name} has local attention, which counts columns"
    if hasattr(config, "num_image_with_embedding"):
        return f"{name} widens every mask by the columns of an image"
    return None


def later_inputs(model: PreTrainedModel) -> dict[str, Any]:
    """What `generate` feeds behind the first token of a text of two; both where the model keeps nothing.

    Raises:
        InputError: other tokens than these.
    """
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    new = 1 if state_argument(model) else 2
    given = {"attention_mask": torch.ones_like(ids), "use_cache": True} | (
        {"next_sequence_length": 1} if new == 1 else {}
    )
    fed = model.prepare_inputs_for_generation(ids, is_first_iteration=False, **given)
    if fed.get("input_ids") is None or fed["input_ids"].shape[1] != new:
        raise InputError(
            f"{type(model).__name__} is not continued with its next token alone, but with others beside it; use a "
            "model that is"
        )
    return fed


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
        for pad in (0, 3):
            engine, mask = TransformersEngine(model), torch.ones(1, 4 + pad, device=text.device)
            mask[:, :pad] = 0
            engine.forward(torch.nn.functional.pad(text[:, :4], (pad, 0)), mask.bool())
            found.append(engine.forward(text[:, 4:]))
        alone, behind = found
        _SHIFTED[model] = bool((alone - behind).abs().max() > 0.01 * alone.abs().max())
    if _SHIFTED[model]:
        raise InputError(
            f"padding before a text changes what {type(model).__name__} computes, so the rows of a batch cannot be fed "
            "again by themselves; run one prompt at a time"
        )


_SHIFTED: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


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
        self.cache = new_cache(model) if cache is None else cache
        self.policy = layer_policy
        self.rewinds = rewinds
        self.reprefills = rewind == "reprefill"
        self.extra = extra or {}
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.takes_positions = "position_ids" in accepted
        self.fixed_positions = position_obstacle(model)
        self.max_new_tokens = max_new_tokens
        self.by_column: dict[int, frozenset[int]] = {}  # layers executed, where there is a policy
        if layer_policy is not None:
            self.switch = LayerSwitch(model)
            self.depth, self.needed = len(decoder_layers(model)), layers_needed(model)
        self.calls = self.tokens_processed = 0
        self.columns = 0
        self.stale = False
        self.held: Tensor | None = None  # the rows in the cache, once one was freed
        self.seen: np.ndarray | None = None  # (batch, open, open): which open columns each of them sees

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.held is not None:
            tokens, mask = tokens[self.held], None if mask is None else mask[self.held]
        return self._of_all_rows(self._feed(tokens, mask))

    def _feed(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        if self.columns == 0 and not self.stale:
            tokens, mask = self._start(tokens, mask)
            if not self.stale:
                executed = None if self.policy is None else self._layers_of(self.columns + tokens.shape[1] - 1)
                return self._forward(tokens, mask, executed, **self.extra)
        uneven = mask is not None and self.rewinds and is_sliding(self.cache) and _is_uneven(mask)
        if self.stale or (uneven and self.reprefills):
            tokens, mask = self._everything(tokens, mask)
            return self._forward(tokens, mask, None, **self.extra)
        if self.policy is None:
            return self._in_parts(tokens, mask) if uneven else self._forward(tokens, mask, None)
        for i in range(tokens.shape[1]):  # the depth may change from one column to the next
            executed = self._layers_of(self.columns)
            logits = self._forward(tokens[:, i : i + 1], None if mask is None else mask[:, i : i + 1], executed)
        return logits

    def _in_parts(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Feed a block in parts in which each row has tokens or padding alone: padding before a token would take up
        room in its window."""
        cuts = ((mask[:, 1:] != mask[:, :-1]).any(0).nonzero()[:, 0] + 1).tolist()
        for part, shown in zip(tokens.tensor_split(cuts, 1), mask.tensor_split(cuts, 1)):
            logits = self._forward(part, shown, None)
        return logits

    def rollback(self, row: int, count: int) -> None:
        if count == 0:
            return
        row = self.places[row]
        if self.reprefills or (self.fixed_positions and (self.batch > 1 or self.padded)):
            self._mark_dead(row, count)
            self.stale = True
        elif self.batch == 1 and not self.padded:
            self._crop(count)
        else:
            self._mark_dead(row, count)
            self._compact()

    def free(self, row: int) -> None:
        """Take a row out of the cache. A cache from which none can be taken keeps it, and it goes along as padding."""
        if not isinstance(self.cache, Cache) or rewind_obstacle(self.cache):
            return
        gone = self.places.pop(row)
        rest = [place for place in range(self.batch) if place != gone]
        index = torch.tensor(rest, dtype=torch.long, device=self.tokens.device)
        self.cache.batch_select_indices(index)
        self.mask, self.tokens, self.live = self.mask[index], self.tokens[index], self.live[index]
        if self.seen is not None:
            self.seen, self.parents, self.positions = self.seen[rest], self.parents[rest], self.positions[index]
        self.batch = len(rest)
        self.held = torch.tensor(list(self.places), dtype=torch.long, device=self.tokens.device)
        self.places = {number: place for place, number in enumerate(self.places)}

    def _of_all_rows(self, logits: Tensor) -> Tensor:
        """Logits with a place for the rows that were freed."""
        if self.held is None:
            return logits
        return logits.new_zeros(self.rows, *logits.shape[1:]).index_copy_(0, self.held, logits)

    # --- trees ---------------------------------------------------------------------------------------------

    def forward_tree(self, tokens: Tensor, mask: Tensor, parents: np.ndarray) -> Tensor:
        """Feed tokens (batch, k) of which several may continue the same one; float32 logits (batch, k, vocab).

        The columns stay open until `commit` says which of them are kept; until then more may be fed on top of them.

        Args:
            mask: (batch, k), False for padding.
            parents: (batch, k), the open column that each token follows, counted from the first one that is open and
                always an earlier one; -1 for what follows the tokens that are not open.
        """
        new = parents.shape[1]
        if self.held is not None:
            tokens, mask, parents = tokens[self.held], mask[self.held], parents[list(self.places)]
        if self.seen is None:
            self.check_tree()
            self._open()
        elif is_sliding(self.cache):
            tokens, mask, parents = self._reopen(tokens, mask, parents)
        held = self._see(parents)
        start, end = self.columns, self.columns + parents.shape[1]
        self._reserve(end)
        self.tokens[:, start:end] = tokens
        settled = self.mask[:, : start - held]
        seen = torch.from_numpy(self.seen[:, held:]).to(tokens.device)
        positions = self.live[:, None] + seen.sum(-1) - 1
        self.positions = torch.cat([self.positions, positions], 1)
        allowed = torch.cat([settled[:, None].expand(-1, parents.shape[1], -1), seen], -1)
        everywhere = torch.cat([settled.long().cumsum(-1) - 1, self.positions], 1)
        inputs = {"input_ids": tokens, "past_key_values": self.cache, "use_cache": True}
        if self.takes_positions:
            inputs["position_ids"] = positions
        inputs["attention_mask"] = tree_mask(self.model, self.cache, allowed, positions, everywhere)
        logits = self.model(**inputs, return_dict=True).logits
        self.columns = end
        self.calls += 1
        self.tokens_processed += int(mask.sum())
        return self._of_all_rows(logits[:, -new:].float())

    def commit(self, kept: Sequence[Sequence[int]]) -> None:
        """Settle the open columns: for each row, those that are kept, in the order of their positions."""
        kept = [kept[row] for row in self.places]
        held = self.seen.shape[1]
        start, width = self.columns - held, max(map(len, kept))
        device, blank = self.tokens.device, [width - len(row) for row in kept]
        alive = torch.tensor([[0] * n + [1] * len(row) for n, row in zip(blank, kept)], device=device).bool()
        index = torch.tensor([[0] * n + [*row] for n, row in zip(blank, kept)], dtype=torch.long, device=device)
        keep_of_last(self.cache, index, held)
        self.tokens[:, start : start + width] = self.tokens[:, start : self.columns].gather(1, index)
        self.mask[:, start : start + width] = alive
        self.columns, self.seen = start + width, None
        self.live += alive.long().sum(-1)
        if not bool(alive.all()):
            self.padded = True
            self._compact()

    def _open(self) -> None:
        self.seen = np.zeros((self.batch, 0, 0), dtype=bool)
        self.parents = np.zeros((self.batch, 0), dtype=int)
        self.positions = self.live.new_zeros(self.batch, 0)

    def _reopen(self, tokens: Tensor, mask: Tensor, parents: np.ndarray) -> tuple[Tensor, Tensor, np.ndarray]:
        """Take the open columns out of the cache and put them in front of the new ones: fed one after the other,
        siblings would fill the windows."""
        held, before = self.parents.shape[1], self.parents
        remove_last(self.cache, [held] * len(self.cache.layers))
        self.columns -= held
        again = self.tokens[:, self.columns : self.columns + held]
        self._open()
        mask = torch.cat([torch.ones_like(again, dtype=mask.dtype), mask], 1)
        return torch.cat([again, tokens], 1), mask, np.concatenate([before, parents], 1)

    def _see(self, parents: np.ndarray) -> int:
        """Let new columns see what their parents see, and themselves. Returns how many were open before."""
        held, new = self.parents.shape[1], parents.shape[1]
        self.parents = np.concatenate([self.parents, parents], 1)
        self.seen = np.pad(self.seen, ((0, 0), (0, new), (0, new)))
        rows = np.arange(self.batch)
        for i in range(held, held + new):
            parent = self.parents[:, i]
            self.seen[:, i] = self.seen[rows, parent] & (parent >= 0)[:, None]
            self.seen[:, i, i] = True  # padding too: a row of attention must not be empty
        return held

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
        if self.policy is not None:
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

    # --- blocks of other shapes ------------------------------------------------------------------------------

    def feed_block(self, tokens: Tensor, mask: Tensor, positions: Tensor, count: int) -> Tensor:
        """Feed tokens (1, k) of a single row that stand at `positions` (1, k) and see what `mask` lets them see;
        float32 logits (count, vocab) of the last ones.

        The first block begins with the prompt; what the cache holds of that is not fed again. What should not stay is
        taken back with `rollback`.

        Args:
            mask: (1, 1, k, columns + k), as the model's attention takes it (`tokenry.models.masks.as_attention_mask`).
        """
        extra = {}
        if self.columns == 0:
            tokens, _ = self._start(tokens, None)
            self.check_tree()
            if tokens.shape[1] < count:
                raise InputError(
                    f"the cache holds the whole prompt ({self.columns} columns); leave the last one to feed"
                )
            mask, positions, extra = mask[:, :, -tokens.shape[1] :], positions[:, -tokens.shape[1] :], self.extra
        start, end = self.columns, self.columns + tokens.shape[1]
        self._reserve(end)
        self.tokens[:, start:end], self.mask[:, start:end] = tokens, True
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
        self.columns = end
        self.live += end - start
        self.calls += 1
        self.tokens_processed += end - start
        return logits[0, -count:].float()

    # --- state ---------------------------------------------------------------------------------------------

    def _start(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Set up for a prompt; returns what of it is still to be fed."""
        self.batch, prompt = tokens.shape
        self.rows, self.places = self.batch, {row: row for row in range(self.batch)}
        device = tokens.device
        self.mask = torch.zeros(self.batch, prompt + 256, dtype=torch.bool, device=device)
        self.tokens = torch.zeros(self.batch, prompt + 256, dtype=torch.long, device=device)
        self.live = torch.zeros(self.batch, dtype=torch.long, device=device)
        self.padded = mask is not None and not bool(mask.all())
        self.dead = 0
        if self.policy is not None:
            if mask is not None and not bool(mask[:, -1].all()):
                raise InputError("a prompt is padded on the right, where tokens will follow; pad on the left")
            self.policy.begin(prompt, self.max_new_tokens)
        if self.rewinds and not self.reprefills:
            obstacle = self._rewind_obstacle()
            if obstacle and "static" in type(self.cache).__name__.lower():
                raise InputError(f"tokens cannot be taken back: {obstacle}; use the default dynamic cache")
            self.reprefills = obstacle is not None
        if self.rewinds and self.batch > 1 and (self.reprefills or self.fixed_positions):
            check_padding(self.model)
        if self.policy is not None and self.reprefills:
            raise InputError(
                "rows cannot be fed again when columns run different layers; use rewind='auto' and the default cache "
                "with a layer policy"
            )
        held = held_columns(self.cache)
        return self._adopt(tokens, mask, held) if held else (tokens, mask)

    def _rewind_obstacle(self) -> str | None:
        if self.carrier is None:
            return f"{type(self.model).__name__} keeps no cache"
        if not isinstance(self.cache, Cache) or not self.model._supports_default_dynamic_cache():
            return f"{type(self.model).__name__} makes a cache of its own"
        return rewind_obstacle(self.cache)

    def _adopt(self, tokens: Tensor, mask: Tensor | None, held: int) -> tuple[Tensor, Tensor | None]:
        """The cache holds the first columns of the prompt already: take them over and return the rest."""
        lengths = [layer.get_seq_length() for layer in self.cache.layers if hasattr(layer, "get_seq_length")]
        rows = next(keys.shape[0] for layer in self.cache.layers if (keys := getattr(layer, "keys", None)) is not None)
        if held >= tokens.shape[1] or rows != self.batch:
            raise InputError(
                f"the cache holds {held} columns of {rows} rows, the prompt has {tokens.shape[1]} of {self.batch}; "
                "pass the whole prompt, and a cache of its first columns that leaves at least the last one to feed"
            )
        if not is_sliding(self.cache) and any(n not in (0, held) for n in lengths):
            raise InputError(
                f"the layers of the cache hold {min(lengths)} to {max(lengths)} columns; pass an empty one"
            )
        known = torch.ones_like(tokens[:, :held]) if mask is None else mask[:, :held]
        self.mask[:, :held], self.tokens[:, :held] = known.bool(), tokens[:, :held]
        self.live = known.long().sum(-1)
        self.columns = held
        if self.rewinds and not self.reprefills:
            self.cache.activate_past_recording()
        tokens, mask = tokens[:, held:], None if mask is None else mask[:, held:]
        # padding between cache and block would take up room in the windows: feed all of it again, left-padded
        self.stale = mask is not None and not bool(mask.all()) and is_sliding(self.cache)
        return tokens, mask

    def _forward(self, tokens: Tensor, mask: Tensor | None, executed: frozenset[int] | None, **extra: Any) -> Tensor:
        start, end = self.columns, self.columns + tokens.shape[1]
        self._reserve(end)
        self.tokens[:, start:end] = tokens
        if mask is None:
            self.mask[:, start:end] = True
            ahead = torch.arange(end - start, device=tokens.device)
            self.tokens_processed += tokens.numel()
        else:
            self.mask[:, start:end] = mask
            ahead = mask.long().cumsum(-1) - 1
            fed = int(mask.sum())
            self.tokens_processed += fed
            self.padded = self.padded or fed < mask.numel()
        positions = (self.live[:, None] + ahead).clamp(min=0)
        self.live += (end - start) if mask is None else mask.long().sum(-1)
        inputs: dict[str, Any] = {"input_ids": tokens}
        if self.carrier is not None:
            inputs |= {self.carrier: self.cache, "use_cache": True}
        if self.padded and (start == 0 or self.masks_later):
            inputs["attention_mask"] = self.mask[:, :end].long()
        if self.takes_positions:
            inputs["position_ids"] = positions
        with self.switch.only(executed) if executed is not None else nullcontext():
            output = self.model(**inputs, **self.last_only, **extra, return_dict=True)
        logits, self.stale = output.logits, self.carrier is None
        if self.carrier is not None and not isinstance(self.cache, Cache):
            self.cache = output[self.carrier]
        if start == 0 and self.rewinds and not self.reprefills and self.carrier is not None:
            self.cache.activate_past_recording()  # sliding layers must keep what a rewind may need
        self.columns = end
        self.calls += 1
        if start > 0 and mask is not None and self.rewinds and is_sliding(self.cache):
            self._compact()  # padding inside the block would take up room in the windows
        # a copy: for a long prompt the model's own logits would keep a large buffer alive
        return logits[:, -1].to(dtype=torch.float32, copy=True)

    def _reserve(self, end: int) -> None:
        have = self.mask.shape[1]
        if end > have:
            grow = max(end, 2 * have) - have
            self.mask = torch.nn.functional.pad(self.mask, (0, grow))
            self.tokens = torch.nn.functional.pad(self.tokens, (0, grow))

    def _layers_of(self, column: int) -> frozenset[int]:
        executed, before = self.policy.layers(column), self.by_column.get(column - 1)
        if executed is not before:  # mostly it is, and needs no check
            executed = self._checked(frozenset(executed), before)
        self.by_column[column] = executed
        return executed

    def _checked(self, executed: frozenset[int], before: frozenset[int] | None) -> frozenset[int]:
        if not self.needed <= executed <= set(range(self.depth)):
            always = ", ".join(map(str, sorted(self.needed)))
            raise InputError(
                f"the layer policy runs {sorted(executed)} of {self.depth} layers; layer {always} is always needed"
            )
        if before is not None and not executed <= before:
            raise InputError(f"the layer policy adds layers {sorted(executed - before)} back; sets may only shrink")
        return executed

    # --- taking tokens back --------------------------------------------------------------------------------

    def _crop(self, count: int) -> None:
        new = self.columns - count
        counts = [count] * len(self.cache.layers)
        if self.policy is not None:
            gone = [self.by_column.pop(c, None) for c in range(new, self.columns)]
            counts = [sum(ran is None or i in ran for ran in gone) for i in range(len(counts))]
        remove_last(self.cache, counts)
        self.mask[:, new : self.columns] = False
        self.live -= count
        self.columns = new

    def _mark_dead(self, row: int, count: int) -> None:
        columns = self.mask[row, : self.columns].nonzero().squeeze(1)[-count:]
        self.mask[row, columns] = False
        self.live[row] -= len(columns)
        self.padded = True

    def _compact(self) -> None:
        needed = int(self.live.max())
        dead = self.columns - needed
        sliding = is_sliding(self.cache)
        if not sliding and dead <= COMPACT_ABOVE * self.columns:
            return
        lengths = layer_lengths(self.cache)
        whole = all(
            length in (0, self.columns) or getattr(layer, "is_sliding", False)
            for length, layer in zip(lengths, self.cache.layers)
        )
        if self.policy is not None or not whole:
            if sliding:
                raise InputError(
                    "tokens of a batch cannot be taken back when layers hold unequal numbers of columns and some have "
                    "a sliding window; run one prompt at a time"
                )
            return  # the mask alone hides dead columns, which is exact too
        order = torch.argsort(self.mask[:, : self.columns].long(), dim=1, stable=True)[:, dead:]
        gather_columns(self.cache, order)
        for name in ("mask", "tokens"):
            old = getattr(self, name)
            packed = torch.zeros_like(old)
            packed[:, :needed] = old[:, : self.columns].gather(1, order)
            setattr(self, name, packed)
        self.columns = needed

    def _everything(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """All live tokens of every row and the new block, left-padded, for a cache that starts again."""
        if not is_sliding(self.cache) and any(n not in (0, self.columns) for n in layer_lengths(self.cache)):
            raise InputError(
                "a compressed cache cannot be filled again; do not combine rewind='reprefill' with cache compression"
            )
        new = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        all_tokens = torch.cat([self.tokens[:, : self.columns], tokens], 1)
        all_mask = torch.cat([self.mask[:, : self.columns], new], 1)
        width = int(all_mask.sum(1).max())
        order = torch.argsort(all_mask.long(), dim=1, stable=True)[:, -width:]
        if not bool(all_mask[:, -1].all()):
            # rows whose newest entry is padding must keep the last column aligned for `logits[:, -1]`
            order = torch.argsort(all_mask[:, :-1].long(), dim=1, stable=True)[:, -width:]
            order = torch.cat([order, torch.full_like(order[:, :1], all_mask.shape[1] - 1)], 1)
        self.cache = new_cache(self.model)
        self.columns, self.stale = 0, False
        self.live.zero_()
        self.mask.zero_()
        self.padded = True
        return all_tokens.gather(1, order), all_mask.gather(1, order)
