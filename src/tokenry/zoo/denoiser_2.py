"""zoo/denoiser-2: zoo/denoiser, with long answers and wider windows.

    list caeb*3=1caeb2caeb3caeb<eos><eos>

It learns on from the denoiser's weights: the same puzzles, and lists, whose answers have up to 40 tokens, in windows of
up to 96. In a window of that width most of an answer is end-of-text, and its own length makes a difference.
"""

from __future__ import annotations

from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..core.progress import Progress
from ..data.puzzles import LISTING, PUZZLES
from ..models.load import load
from . import denoiser
from .denoiser import LEVELS, Course, examples, solved, teach

__all__ = ["COURSE", "build_tokenizer", "measure", "train", "untrained"]

START, KINDS, CHARACTERS = "zoo/denoiser", ("list ",), "*abcdefgh"  # the tokens are those that it has more
COURSE = Course(
    kinds=(*PUZZLES, LISTING),
    shares=(0.15, 0.2, 0.2, 0.45),
    levels={**LEVELS, LISTING.name: LISTING.levels},
    widest=96,
    spare=6.0,
)
STEPS, LEARNING_RATE = 2600, 1.5e-3


def build_tokenizer() -> PreTrainedTokenizerFast:
    """That of the denoiser, with tokens for lists behind its own."""
    return denoiser.build_tokenizer(KINDS, CHARACTERS)


def untrained(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The denoiser, with random weights for new tokens."""
    start, _ = load(START, device="cpu")
    model, old = denoiser.untrained(tokenizer), start.state_dict()
    with torch.no_grad():
        for name, weights in model.state_dict().items():
            weights[: len(old[name])] = old[name]
    return cast(PreTrainedModel, model)


def train(seed: int = 0, progress: Progress | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Teach it from the seed, with examples that the denoiser has not had."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = untrained(tokenizer)
    teach(model, tokenizer, examples(tokenizer, seed + 1, COURSE), STEPS, LEARNING_RATE, progress)
    return model, tokenizer


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """What it has `solved` in windows of 48."""
    return solved(model, tokenizer, COURSE, 48)
