"""zoo/tidar: zoo/reasoner, taught to guess the next tokens as well, so that it drafts for itself.

It learns on from the reasoner's weights and lessons. Its tokenizer has one token more, the mask. Guesses are good after
a few hundred steps; the rest is for the next tokens, from which they have taken. A larger alpha in the second phase did
not give more back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.progress import Progress
from ..data.problems import Arithmetic, draw_problems
from ..decode.api import generate
from ..decode.speculation.loop import SpeculativeOutput
from ..decode.tidar import TiDAR
from ..models.load import load
from ..train.tidar import tidar_loss
from .reasoner import LEVELS, examples
from .training import batches_by_length, fit

__all__ = ["measure", "train"]

START, MASK = "zoo/reasoner", "<mask>"
BLOCK = 4
PROBLEMS, MAX_NEW_TOKENS, ROWS = 240, 256, 60  # what is measured, and how many of them at a time
PHASES, BATCH_TOKENS = ((2200, 1e-3), (600, 6e-4)), 2000  # (steps, highest learning rate) of each


def untrained(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The reasoner with a mask token that means nothing yet."""
    model, tokenizer = load(START, device="cpu")
    torch.manual_seed(seed)
    tokenizer.add_special_tokens({"mask_token": MASK})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.mask_token_id, model.config.tidar_block_size = tokenizer.mask_token_id, BLOCK
    return model, tokenizer


def lessons(tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of the reasoner's lessons, padded to whole blocks. Prompts are read and not learned."""
    padding = cast(int, tokenizer.pad_token_id)
    for batch in batches_by_length(examples(tokenizer, seed), BATCH_TOKENS, padding):
        missing = -batch["input_ids"].shape[1] % BLOCK
        fill = {"input_ids": padding, "attention_mask": 0, "labels": -100}
        yield {name: pad(batch[name], (0, missing), value=value) for name, value in fill.items()}


def loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """What it learns: next tokens and masked ones alike."""
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    return tidar_loss(model, ids, model.config.mask_token_id, BLOCK, attention_mask=mask, labels=labels).loss


def train(seed: int = 0, progress: Progress | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Teach it from the seed, with examples that the reasoner has not had."""
    model, tokenizer = untrained(seed)
    batches = lessons(tokenizer, seed + 1)
    for steps, learning_rate in PHASES:
        fit(model, batches, steps, learning_rate, loss=loss, progress=progress)
    return model, tokenizer


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Greedy, on test problems of all levels: `accuracy`; and on a quarter of them `tokens_per_forward` of a text that
    is drafted, and `same`, the share of these texts that are those of one token at a time."""
    questions = [problem.question for problem in draw_problems(Arithmetic(), PROBLEMS // 4, levels=LEVELS)]
    plain = generate(model, tokenizer, questions, max_new_tokens=MAX_NEW_TOKENS)
    method = TiDAR()  # pyright: ignore[reportCallIssue]  # the defaults that Field is given by place are not seen
    drafted = [
        cast(SpeculativeOutput, generate(model, tokenizer, question, methods=[method], max_new_tokens=MAX_NEW_TOKENS))
        for question in questions
    ]
    emitted, calls = (sum(getattr(out.stats, name) for out in drafted) for name in ("emitted", "target_calls"))
    rows = [cast(list[list[int]], out.new_ids)[0] for out in drafted]
    return {
        "accuracy": sum(solved(model, tokenizer)) / PROBLEMS,
        "tokens_per_forward": emitted / calls,
        "same": sum(row == ids for row, ids in zip(rows, cast(list[list[int]], plain.new_ids))) / len(questions),
    }


def solved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = PROBLEMS) -> list[bool]:
    """Which test problems of all levels are solved one token at a time, by the likeliest ones."""
    task, problems, found = Arithmetic(), draw_problems(Arithmetic(), count, levels=LEVELS), []
    for start in range(0, count, ROWS):
        batch = problems[start : start + ROWS]
        texts = generate(model, tokenizer, [p.question for p in batch], max_new_tokens=MAX_NEW_TOKENS).texts
        found += [task.check(problem, text) for problem, text in zip(batch, cast(list[str], texts))]
    return found
