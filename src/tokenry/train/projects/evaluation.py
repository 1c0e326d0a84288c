"""How well a model foretells source code: loss, and lines that it would complete exactly."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...models.batch import right_padded

__all__ = ["Foretold", "foretell", "line_ends"]


class Foretold(NamedTuple):
    """Of one window: nats over its next tokens, how many these are, lines, and lines completed exactly."""

    nats: float
    tokens: int
    lines: int
    exact: int


@torch.no_grad()
def foretell(
    model: PreTrainedModel, pieces: Sequence[Sequence[int]], ends: Tensor, batch_size: int = 8
) -> list[Foretold]:
    """What the model makes of each window.

    A line counts from its first token to the one that ends it. Greedy completion from where it starts writes all of it
    if and only if every one of its tokens is the likeliest after those before, so one forward pass tells.

    Args:
        pieces: token ids of windows.
        ends: (vocabulary,) bool, see `line_ends`.
    """
    was_training = model.training
    model.eval()
    found = []
    for start in range(0, len(pieces), batch_size):
        ids, present = right_padded(pieces[start : start + batch_size])
        ids, present = ids.to(model.device), present.to(model.device)
        logits = model(input_ids=ids, attention_mask=present.long(), use_cache=False).logits[:, :-1].float()
        targets, real = ids[:, 1:], present[:, 1:]
        nats = cross_entropy(logits.transpose(1, 2), targets, reduction="none") * real
        right = logits.argmax(-1) == targets
        for row in range(len(ids)):
            count = int(real[row].sum())
            lines = exact_lines(right[row, :count], ends[ids[row, : count + 1]])
            found.append(Foretold(float(nats[row].sum()), count, len(lines), sum(lines)))
    model.train(was_training)
    return found


def exact_lines(right: Tensor, ends: Tensor) -> list[bool]:
    """Of each whole line of a window: whether all its tokens are foretold.

    Args:
        right: (time - 1,) whether the next token is the likeliest one.
        ends: (time,) whether a token ends a line.
    """
    places = ends.nonzero()[:, 0].tolist()
    # a line of an end alone is empty
    return [bool(right[first:last].all()) for first, last in pairwise(places) if last - first > 1]


def line_ends(tokenizer: PreTrainedTokenizerBase, size: int) -> Tensor:
    """(size,) bool: which tokens hold the end of a line."""
    known = len(tokenizer)
    texts = tokenizer.batch_decode([[i] for i in range(min(size, known))], clean_up_tokenization_spaces=False)
    return torch.tensor(["\n" in text for text in texts] + [False] * (size - min(size, known)))
