"""Inputs for tests of attention, and what a model must be after a context was left."""

import copy

import torch
from support.families import own_hooks

KINDS = ["llama", "gemma3", "qwen2"]


LENGTH = 40  # beyond Gemma's window of 16


def random_ids(rows=1, length=LENGTH):
    return torch.randint(2, 320, (rows, length), generator=torch.Generator().manual_seed(1))


def left_padded():
    """Three rows with 0, 5 and 21 columns of padding."""
    ids, mask = random_ids(3), torch.ones(3, LENGTH, dtype=torch.long)
    for row, pad in enumerate((0, 5, 21)):
        ids[row, :pad], mask[row, :pad] = 1, 0
    return ids, mask


def eager(model):
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def assert_clean(model):
    assert model.config._attn_implementation == "sdpa"
    assert own_hooks(model) == []
