"""An engine in any order of its calls: what it says next is what a fresh forward over the ids alone says.

The machine feeds blocks with padding, takes tokens back from random rows, grows draft trees and keeps a path of them,
and frees rows. Beside it stands what every row holds, as plain lists.
"""

import random

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.families import build

from tokenry.decode import TransformersEngine
from tokenry.models.batch import left_padded

MODELS = {family: build(family) for family in ("llama", "gemma3")}  # the second has windows of 16 columns
SEEDS = st.integers(0, 2**16)


def some(seed, count):
    """So many tokens; drawn from a seed, since a search for smaller ones would find nothing."""
    return random.Random(seed).choices(range(2, 320), k=count)


class EngineMachine(RuleBasedStateMachine):
    """Rows are numbered as in the batch; `held` is what each has been fed and not had taken back, None once freed."""

    family = "llama"
    rewind = "auto"

    @initialize(lengths=st.lists(st.integers(1, 24), min_size=1, max_size=3), seed=SEEDS)
    def begin(self, lengths, seed):
        prompts = [some(seed + row, length) for row, length in enumerate(lengths)]
        self.model = MODELS[self.family]
        self.engine = TransformersEngine(self.model, rewinds=True, rewind=self.rewind)
        self.first = lengths
        self.held = [[] for _ in prompts]
        self.calls = self.fed = 0
        self.feed(prompts)

    @property
    def fewest(self):
        """Whoever feeds rows again has padding in its windows until then, where a row is left out."""
        return int(self.rewind == "reprefill")

    @property
    def live(self):
        return [row for row, ids in enumerate(self.held) if ids is not None]

    @torch.no_grad()
    def feed(self, new):
        """Feed these tokens to the rows that live, and compare the rows that got some."""
        block, mask = left_padded(new)
        logits = self.engine.forward(block, None if bool(mask.all()) else mask)
        self.calls += 1
        self.fed += sum(map(len, new))
        for row in self.live:
            self.held[row] += new[row]
            if new[row]:
                self.same(logits[row], self.held[row])

    @torch.no_grad()
    def same(self, logits, ids):
        expected = self.model(torch.tensor([ids])).logits[0, -1]
        assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4), (logits - expected).abs().max()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), width=st.integers(1, 6), seed=SEEDS)
    def forward(self, data, width, seed):
        """A block in which some rows have fewer tokens than others, or none."""
        counts = [data.draw(st.integers(self.fewest, width)) if ids is not None else 0 for ids in self.held]
        counts[data.draw(st.sampled_from(self.live))] = width
        self.feed([some(seed + row, count) for row, count in enumerate(counts)])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def rollback(self, data):
        """Take tokens back, never from the prompt."""
        row = data.draw(st.sampled_from(self.live))
        count = data.draw(st.integers(0, min(9, len(self.held[row]) - self.first[row])))
        self.engine.rollback(row, count)
        del self.held[row][len(self.held[row]) - count :]

    @precondition(lambda self: self.live and self.rewind == "auto")
    @rule(data=st.data(), width=st.integers(1, 5), levels=st.integers(1, 2), seed=SEEDS)
    @torch.no_grad()
    def tree(self, data, width, levels, seed):
        """Grow a tree in one or two blocks, compare every node of it, and keep a path of random length."""
        rows = range(len(self.held))
        parents = np.full((len(self.held), 0), -1)
        tokens = torch.zeros(len(self.held), 0, dtype=torch.long)
        for _ in range(levels):
            known = parents.shape[1]
            new = [[data.draw(st.integers(-1, known + i - 1)) for i in range(width)] for _ in rows]
            ids = torch.tensor([some(seed + row + known, width) for row in rows])
            mask = torch.tensor([[row in self.live] * width for row in rows])
            logits = self.engine.forward_tree(ids, mask, np.array(new))
            parents, tokens = np.concatenate([parents, new], 1), torch.cat([tokens, ids], 1)
            self.calls += 1
            self.fed += (width + (known if self.family == "gemma3" else 0)) * len(
                self.live
            )  # windows: again from the root
            for row in self.live:
                for node in range(known, known + width):
                    path = self.path(parents[row], node)
                    self.same(logits[row, node - known], self.held[row] + tokens[row, path].tolist())
        kept = [[] for _ in rows]
        for row in self.live:
            kept[row] = self.path(parents[row], data.draw(st.integers(-1, parents.shape[1] - 1)))
            self.held[row] += tokens[row, kept[row]].tolist()
        self.engine.commit(kept)

    @staticmethod
    def path(parents, node):
        """The columns from the root to a node."""
        found = []
        while node >= 0:
            found.insert(0, node)
            node = int(parents[node])
        return found

    @precondition(lambda self: len(self.live) > 1)
    @rule(data=st.data())
    def free(self, data):
        row = data.draw(st.sampled_from(self.live))
        self.engine.free(row)
        self.held[row] = None

    @invariant()
    def ids_are_those_of_the_model_in_plain_python(self):
        if not hasattr(self, "held"):
            return
        engine = self.engine
        assert set(engine.grid.places) == set(self.live)
        for row, place in engine.grid.places.items():
            columns = engine.grid.mask[place, : engine.columns]
            assert engine.grid.tokens[place, : engine.columns][columns].tolist() == self.held[row]
            assert int(engine.grid.live[place]) == len(self.held[row])
        if self.rewind == "auto":
            assert engine.tokens_processed == self.fed and engine.calls >= self.calls

    def teardown(self):
        """What every row is told next, all together and one at a time."""
        if getattr(self, "held", None):
            for row in self.live if self.fewest == 0 else ():
                self.feed([[7] if one == row else [] for one in range(len(self.held))])
            self.feed([[5] if row in self.live else [] for row in range(len(self.held))])


@pytest.mark.parametrize(("family", "rewind"), [("llama", "auto"), ("gemma3", "auto"), ("gemma3", "reprefill")])
def test_an_engine_in_any_order_of_its_calls(family, rewind):
    machine = type("Machine", (EngineMachine,), {"family": family, "rewind": rewind})
    options = {"max_examples": 30, "stateful_step_count": 12, "deadline": None, "derandomize": True, "database": None}
    run_state_machine_as_test(machine, settings=settings(**options))


@torch.no_grad()
@pytest.mark.parametrize("rewind", ["auto", "reprefill"])
def test_padding_before_a_token_takes_no_room_in_its_window(rewind):
    """As when a monitor has forced two tokens on one row, and the other one has its next token alone."""
    engine = TransformersEngine(MODELS["gemma3"], rewinds=True, rewind=rewind)
    held = [[2], list(range(20, 40))]
    for new in (held, [[7, 9], [3]], [[5], [8]]):
        logits = engine.forward(*left_padded(new))
        held = held if new is held else [[*ids, *more] for ids, more in zip(held, new)]
        for row, ids in enumerate(held):
            expected = MODELS["gemma3"](torch.tensor([ids])).logits[0, -1]
            assert torch.allclose(logits[row], expected, atol=1e-5)
