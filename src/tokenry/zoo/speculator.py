"""zoo/speculator: a small brother of zoo/reasoner, with the same tokenizer and the same lessons.

An eighth of the size: it writes the same solutions faster, and errs more often. It writes steps for zoo/reasoner to
judge.
"""

from __future__ import annotations

from itertools import islice

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .reasoner import examples, measure, untrained
from .training import Progress, batches_by_length, fit

__all__ = ["measure", "train"]

SHAPE = {
    "hidden_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 224,
}
BATCH_TOKENS = 6000
FIRST, PLANNED, LAST = 2000, 3000, 400  # steps: of the first phase, those its schedule is made for, of the last one


def train(seed: int = 0, progress: Progress | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train it from the seed: most of a long schedule, then a short one that lets the learning rate fall."""
    model, tokenizer = untrained(seed, SHAPE)
    batches = batches_by_length(examples(tokenizer, seed), BATCH_TOKENS, tokenizer.pad_token_id)
    fit(model, islice(batches, FIRST), PLANNED, learning_rate=2e-3, progress=progress)
    fit(model, batches, LAST, learning_rate=8e-4, warmup=20, progress=progress)
    return model, tokenizer
