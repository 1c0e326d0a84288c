"""The tokens of a batch in shared columns, as a cache holds them; what no row has there is masked."""

from __future__ import annotations

from copy import copy

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Grid", "OpenColumns"]

ROOM = 256  # columns that are reserved behind a prompt


class Grid:
    """What every column holds of each row: a token, or nothing: padding, or one that was taken back.

    Rows that were freed are gone; the others stand at their `places`.

    Attributes:
        columns: how many are in use.
        tokens, mask: (rows, room), ids, and where they count.
        live: (rows,), the tokens of each row, which is the position of its next one.
        padded: whether some column is not a token of every row.
        places: {row of the generation: row here}.
    """

    def __init__(self, tokens: Tensor, mask: Tensor | None) -> None:
        self.rows, prompt = tokens.shape
        room, device = prompt + ROOM, tokens.device
        self.tokens = torch.zeros(self.rows, room, dtype=torch.long, device=device)
        self.mask = torch.zeros(self.rows, room, dtype=torch.bool, device=device)
        self.live = torch.zeros(self.rows, dtype=torch.long, device=device)
        self.columns = 0
        self.padded = mask is not None and not bool(mask.all())
        self.places = {row: row for row in range(self.rows)}
        self.held: Tensor | None = None  # the rows that are here, once one was freed

    @property
    def batch(self) -> int:
        """How many rows are here."""
        return len(self.places)

    # --- rows ----------------------------------------------------------------------------------------------

    def free(self, row: int) -> Tensor:
        """Let a row go; returns the places of those that stay."""
        gone = self.places.pop(row)
        rest = [place for place in range(self.batch + 1) if place != gone]
        index = torch.tensor(rest, dtype=torch.long, device=self.tokens.device)
        self.mask, self.tokens, self.live = self.mask[index], self.tokens[index], self.live[index]
        self.held = torch.tensor(list(self.places), dtype=torch.long, device=self.tokens.device)
        self.places = {number: place for place, number in enumerate(self.places)}
        return index

    def select(self, rows: Tensor) -> None:
        """Go on with copies of these rows, numbered anew; a row may come several times."""
        rows = rows.to(self.tokens.device)
        self.mask, self.tokens, self.live = self.mask[rows], self.tokens[rows], self.live[rows]
        self.rows, self.places, self.held = len(rows), {row: row for row in range(len(rows))}, None

    def only(self, row: int) -> Grid:
        """A grid with a copy of one row."""
        one, place = copy(self), self.places[row]
        for name in ("mask", "tokens", "live"):
            setattr(one, name, getattr(self, name)[place : place + 1].clone())
        one.places, one.held = {row: 0}, None
        return one

    def join(self, other: Grid) -> None:
        """Put the rows of another grid under these, the shorter ones behind empty columns, so that all end in the same
        one."""
        grids, width = (self, other), max(self.columns, other.columns)
        before = (width - self.columns, width - other.columns)
        for name in ("mask", "tokens"):
            parts = [pad(getattr(g, name)[:, : g.columns], (n, ROOM)) for g, n in zip(grids, before)]
            setattr(self, name, torch.cat(parts))
        self.live, self.columns = torch.cat([self.live, other.live]), width
        self.places |= {row: self.batch + place for row, place in other.places.items()}
        self.padded = self.padded or other.padded or any(before)

    def here(self, values: Tensor) -> Tensor:
        """Of values for all rows, those of the rows that are here."""
        return values if self.held is None else values[self.held]

    def everywhere(self, values: Tensor) -> Tensor:
        """Values of the rows that are here, with zeros for those that were freed."""
        if self.held is None:
            return values
        return values.new_zeros(self.rows, *values.shape[1:]).index_copy_(0, self.held, values)

    # --- columns -------------------------------------------------------------------------------------------

    def adopt(self, tokens: Tensor, mask: Tensor | None) -> None:
        """These columns are in the cache already."""
        held = tokens.shape[1]
        known = torch.ones_like(tokens) if mask is None else mask
        self.mask[:, :held], self.tokens[:, :held] = known.bool(), tokens
        self.live, self.columns = known.long().sum(-1), held

    def open(self, tokens: Tensor) -> None:
        """Add columns of which nobody knows yet whether they count."""
        start, self.columns = self.columns, self.columns + tokens.shape[1]
        if self.columns > self.mask.shape[1]:
            grow = max(self.columns, 2 * self.mask.shape[1]) - self.mask.shape[1]
            self.mask, self.tokens = pad(self.mask, (0, grow)), pad(self.tokens, (0, grow))
        self.tokens[:, start : self.columns] = tokens

    def add(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, int]:
        """Add a block (rows, k); returns the positions of its tokens (rows, k), and how many tokens these are."""
        start, width = self.columns, tokens.shape[1]
        self.open(tokens)
        if mask is None:
            self.mask[:, start : self.columns] = True
            positions = self.live[:, None] + torch.arange(width, device=tokens.device)
            self.live += width
            return positions.clamp(min=0), tokens.numel()
        self.mask[:, start : self.columns] = mask
        positions = self.live[:, None] + mask.long().cumsum(-1) - 1
        self.live += mask.long().sum(-1)
        fed = int(mask.sum())
        self.padded = self.padded or fed < mask.numel()
        return positions.clamp(min=0), fed

    def take_open(self, held: int) -> Tensor:
        """Take the newest `held` columns out, which are open: (rows, held), their tokens."""
        self.columns -= held
        return self.tokens[:, self.columns : self.columns + held].clone()

    def settle(self, index: Tensor, alive: Tensor, held: int) -> None:
        """Of the newest `held` columns, which were open, keep those at `index` (rows, kept), where `alive`."""
        start, width = self.columns - held, index.shape[1]
        self.tokens[:, start : start + width] = self.tokens[:, start : self.columns].gather(1, index)
        self.mask[:, start : start + width] = alive
        self.columns = start + width
        self.live += alive.long().sum(-1)

    # --- taking tokens back --------------------------------------------------------------------------------

    def shorten(self, count: int) -> None:
        """Take the newest columns away, which are tokens of every row."""
        new = self.columns - count
        self.mask[:, new : self.columns] = False
        self.live -= count
        self.columns = new

    def mark_dead(self, place: int, count: int) -> None:
        """Take the newest `count` tokens of one row back; their columns stay."""
        columns = self.mask[place, : self.columns].nonzero().squeeze(1)[-count:]
        self.mask[place, columns] = False
        self.live[place] -= len(columns)
        self.padded = True

    def dead(self) -> int:
        """How many columns could go if every row had its tokens side by side."""
        return self.columns - int(self.live.max())

    def pack(self, dead: int) -> Tensor:
        """Let as many columns go, so that tokens stand side by side; returns which stay (rows, columns)."""
        order = torch.argsort(self.mask[:, : self.columns].long(), dim=1, stable=True)[:, dead:]
        for name in ("mask", "tokens"):
            old = getattr(self, name)
            packed = torch.zeros_like(old)
            packed[:, : order.shape[1]] = old[:, : self.columns].gather(1, order)
            setattr(self, name, packed)
        self.columns -= dead
        return order

    def start_again(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """All tokens of every row and a new block, left-padded; nothing is in the columns any more."""
        new = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
        all_tokens = torch.cat([self.tokens[:, : self.columns], tokens], 1)
        all_mask = torch.cat([self.mask[:, : self.columns], new], 1)
        width = int(all_mask.sum(1).max())
        order = torch.argsort(all_mask.long(), dim=1, stable=True)[:, -width:]
        if not bool(all_mask[:, -1].all()):
            # rows whose newest entry is padding must keep the last column aligned for `logits[:, -1]`
            order = torch.argsort(all_mask[:, :-1].long(), dim=1, stable=True)[:, -width:]
            order = torch.cat([order, torch.full_like(order[:, :1], all_mask.shape[1] - 1)], 1)
        self.columns, self.padded = 0, True
        self.live.zero_()
        self.mask.zero_()
        return all_tokens.gather(1, order), all_mask.gather(1, order)


class OpenColumns:
    """Columns behind the settled ones of which several may continue the same token; one of these at most is kept.

    Attributes:
        parents: (rows, open), the open column that each follows; -1 for the settled ones.
        sees: (rows, open, open), which open columns each of them sees.
        positions: (rows, open).
    """

    def __init__(self, live: Tensor) -> None:
        self.live = live
        self.parents = np.zeros((len(live), 0), dtype=int)
        self.sees = np.zeros((len(live), 0, 0), dtype=bool)
        self.positions = live.new_zeros(len(live), 0)

    def __len__(self) -> int:
        return self.parents.shape[1]

    def add(self, parents: np.ndarray) -> tuple[Tensor, Tensor]:
        """Let new columns see what their parents see, and themselves: (rows, new, open), and their positions."""
        held, new = self.parents.shape[1], parents.shape[1]
        self.parents = np.concatenate([self.parents, parents], 1)
        self.sees = np.pad(self.sees, ((0, 0), (0, new), (0, new)))
        rows = np.arange(len(parents))
        for i in range(held, held + new):
            parent = self.parents[:, i]
            self.sees[:, i] = self.sees[rows, parent] & (parent >= 0)[:, None]
            self.sees[:, i, i] = True  # padding too: a row of attention must not be empty
        seen = torch.from_numpy(self.sees[:, held:]).to(self.live.device)
        positions = self.live[:, None] + seen.sum(-1) - 1
        self.positions = torch.cat([self.positions, positions], 1)
        return seen, positions

    def take(self, places: Tensor, live: Tensor) -> None:
        """Only these rows stay."""
        rows = places.cpu().numpy()
        self.sees, self.parents, self.positions = self.sees[rows], self.parents[rows], self.positions[places]
        self.live = live
