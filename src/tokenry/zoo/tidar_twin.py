"""zoo/tidar-twin: what zoo/tidar would be if it had not learned to guess. It has had the same batches of lessons."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.progress import Progress
from .tidar import PHASES, PROBLEMS, lessons, solved, untrained
from .training import fit

__all__ = ["measure", "train"]


def train(seed: int = 0, progress: Progress | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Teach it next tokens alone."""
    model, tokenizer = untrained(seed)
    batches = lessons(tokenizer, seed + 1)
    for steps, learning_rate in PHASES:
        fit(model, batches, steps, learning_rate, progress=progress)
    return model, tokenizer


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """`accuracy` as that of zoo/tidar."""
    return {"accuracy": sum(solved(model, tokenizer)) / PROBLEMS}
