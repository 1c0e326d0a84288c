"""zoo/translator-a, -b and -c: three small translation models of one generated language pair.

Each learns from another third of the training sentences of `data/translation.py`, and all from few, so that rare words
come out wrong now and then, each model's own. A token is a word of either language.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..core.progress import Progress
from ..data.translation import Sentence, draw_sentences, errors_of, vocabulary
from ..models.batch import right_padded
from .training import fit, word_tokenizer

__all__ = ["build_tokenizer", "lessons", "measure", "train"]

SPECIAL = ("<pad>", "<eos>", "<unk>", "<begin>", "<mask>")
SHAPE = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 160, "decoder_ffn_dim": 160, "d_model": 80}
HEADS, WINDOW, LONGEST = 4, 32, 20  # most tokens of a sentence, and of a translation that is written
SENTENCES, STEPS, BATCH = 500, 700, 64
MEASURED = 200


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token per word; a sentence ends with <eos>."""
    return word_tokenizer(vocabulary(), SPECIAL, WINDOW, ending="<eos>", mask_token="<mask>")


def untrained(tokenizer: PreTrainedTokenizerBase) -> BartForConditionalGeneration:
    """A model with random weights."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = BartConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=WINDOW,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        decoder_start_token_id=SPECIAL.index("<begin>"),
        forced_eos_token_id=None,
        **SHAPE,
        **ids,
    )
    return BartForConditionalGeneration(config)


def lessons(third: int) -> list[Sentence]:
    """What a model has learned from: 0 for zoo/translator-a, 1 for -b, 2 for -c."""
    return draw_sentences(SENTENCES, "train", third)


def train(
    seed: int = 0, progress: Progress | None = None, third: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Train one of them from the seed."""
    torch.manual_seed(1000 * third + seed)
    tokenizer = build_tokenizer()
    model = untrained(tokenizer)
    fit(model, _batches(tokenizer, lessons(third), seed), STEPS, learning_rate=3e-3, warmup=200, progress=progress)
    return model, tokenizer


def _batches(
    tokenizer: PreTrainedTokenizerBase, sentences: Sequence[Sentence], seed: int
) -> Iterator[dict[str, Tensor]]:
    """Endless: the sentences in another order each time."""
    rng, pad = random.Random(seed), cast(int, tokenizer.pad_token_id)
    pairs = [(tokenizer(s.source).input_ids, tokenizer(s.target).input_ids) for s in sentences]
    while True:
        rng.shuffle(pairs)
        for first in range(0, len(pairs) - BATCH + 1, BATCH):
            sources, targets = zip(*pairs[first : first + BATCH])
            ids, present = right_padded(sources, pad)
            labels, learned = right_padded(targets, pad)
            yield {
                "input_ids": ids,
                "attention_mask": present.long(),
                "labels": labels.masked_fill(~learned, -100),
            }


@torch.no_grad()
def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Of 200 test sentences, translated by a beam of 5.

    Returns `right` (share of words without an error), `perfect` (sentences without one), `score` (mean of the
    translations' scores, see `errors_of`) and `finished`.
    """
    sentences = draw_sentences(MEASURED, "test")
    batch = tokenizer([s.source for s in sentences], return_tensors="pt", padding=True, padding_side="right")
    ids = cast(Tensor, cast(Any, model).generate(**batch, num_beams=5, max_new_tokens=LONGEST))
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    found = [errors_of(sentence, text.split()) for sentence, text in zip(sentences, texts)]
    wrong = [word for errors in found for word in errors.wrong]
    return {
        "right": 1 - sum(wrong) / len(wrong),
        "perfect": sum(errors.score == 1 for errors in found) / len(found),
        "score": sum(errors.score for errors in found) / len(found),
        "finished": float(ids.eq(cast(int, tokenizer.eos_token_id)).any(1).float().mean()),
    }
