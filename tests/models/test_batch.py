"""Rows of token ids as one block."""

import torch

from tokenry.models.batch import left_padded, position_arguments, position_ids, right_padded

ROWS = [[5, 6, 7], [8]]


def test_padding_on_either_side():
    ids, mask = left_padded(ROWS, pad=1)
    assert ids.tolist() == [[5, 6, 7], [1, 1, 8]] and mask.tolist() == [[True] * 3, [False, False, True]]
    assert position_ids(mask).tolist() == [[0, 1, 2], [0, 0, 0]]
    ids, mask = right_padded(ROWS, pad=1)
    assert ids.tolist() == [[5, 6, 7], [8, 1, 1]] and mask.tolist() == [[True] * 3, [True, False, False]]


def test_positions_are_given_where_they_are_taken(make_model):
    mask = torch.tensor([[0, 0, 1, 1]])
    assert position_arguments(make_model("llama"), mask)["position_ids"].tolist() == [[0, 0, 0, 1]]
    assert position_arguments(torch.nn.Linear(1, 1), mask) == {}
