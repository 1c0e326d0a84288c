"""zoo/speculator: a small brother of zoo/reasoner, with the same tokenizer and the same lessons.

An eighth of the size: it writes the same solutions faster, and errs more often. It writes steps for zoo/reasoner to
judge.
"""

from __future__ import annotations

from itertools import islice
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..core.progress import Progress
from .reasoner import examples, measure, untrained
from .training import batches_by_length, fit

__all__ = ["measure", "train"]

SHAPE = {
    "hidden_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 224,
}
FIRST, PLANNED, LARGE = 2000, 3000, 6000  # steps of the first phase, those its schedule is made for, tokens of a batch
LAST, SMALL = 1200, 2500  # steps of the last phase, tokens of a batch


def train(seed: int = 0, progress: Progress | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train it from the seed: most of a long schedule, then a short one with smaller batches of new examples."""
    model, tokenizer = untrained(seed, SHAPE)
    pad = cast(int, tokenizer.pad_token_id)
    first = batches_by_length(examples(tokenizer, seed), LARGE, pad)
    fit(model, islice(first, FIRST), PLANNED, learning_rate=2e-3, progress=progress)
    last = batches_by_length(examples(tokenizer, seed + 1), SMALL, pad)
    fit(model, last, LAST, learning_rate=1e-3, warmup=50, progress=progress)
    return model, tokenizer
