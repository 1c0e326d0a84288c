"""zoo/speculator: a small brother of zoo/reasoner, with the same tokenizer and the same lessons.

An eighth of the size: it writes the same solutions faster, and errs more often. It drafts for zoo/reasoner.
"""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from . import reasoner
from .reasoner import measure
from .training import Progress

__all__ = ["measure", "train"]

SHAPE = {
    "hidden_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 224,
}
STEPS = 3000


def train(seed: int = 0, progress: Progress | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train it from the seed."""
    return reasoner.train(seed, progress, SHAPE, STEPS)
