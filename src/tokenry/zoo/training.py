"""What recipes share: a tokenizer, an untrained model, batches of examples of like length, a short training loop."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ..core.progress import Progress
from ..models.batch import right_padded

__all__ = ["batches_by_length", "character_tokenizer", "fit", "untrained_llama", "word_tokenizer"]

T = TypeVar("T")
Trained = TypeVar("Trained", bound=nn.Module)
POOL = 2048  # examples that are sorted by length at a time


def character_tokenizer(
    tokens: Sequence[str],
    words: Sequence[str],
    special: Sequence[str],
    window: int,
    template: str,
    marks: Sequence[str] = (),
    **names: str,
) -> PreTrainedTokenizerFast:
    """A token per character, but for some words and marks; every text made of them decodes to itself.

    Args:
        tokens: all of them, in the order of their ids.
        words: those that are longer than a character; marks: the same, and never part of anything else.
        special: left out of texts; "<pad>", "<eos>" and "<unk>" are what they say.
        window: most tokens of a text.
        names: what else the tokenizer is given, such as mask_token.
    """
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(words) + r"|[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    raw.add_tokens([AddedToken(token, normalized=False) for token in marks])
    tokenizer = _fast(raw, window, **names)
    tokenizer.chat_template = template
    return tokenizer


def word_tokenizer(
    words: Sequence[str], special: Sequence[str], window: int, ending: str = "", **names: str
) -> PreTrainedTokenizerFast:
    """A token per word between spaces; `special` come first in the vocabulary. Else as `character_tokenizer`.

    Args:
        ending: a special token that is put behind every text.
    """
    places = {word: i for i, word in enumerate([*special, *words])}
    raw = Tokenizer(models.WordLevel(places, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    if ending:
        raw.post_processor = processors.TemplateProcessing(
            f"$A {ending}", f"$A {ending} $B {ending}", special_tokens=[(ending, places[ending])]
        )
    return _fast(raw, window, **names)


def _fast(raw: Tokenizer, window: int, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=window,
        **names,
    )


def untrained_llama(tokenizer: PreTrainedTokenizerBase, window: int, **config: Any) -> LlamaForCausalLM:
    """A Llama with random weights for this tokenizer and contexts of at most `window` tokens."""
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": window, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(rope_parameters=rope, **{**ids, **shape, **config}))


def hide_prompts(batch: Sequence[tuple[list[int], int]], pad_id: int) -> dict[str, Tensor]:
    """A right-padded batch of examples (ids, length of the prompt).

    Returns `input_ids`, `attention_mask` and `labels` (batch, time); prompts and padding have the label -100.
    """
    ids, present = right_padded([ids for ids, _ in batch], pad_id)
    prompts = torch.tensor([[prompt] for _, prompt in batch])
    learned = (torch.arange(ids.shape[1]) >= prompts) & present
    return {"input_ids": ids, "attention_mask": present.long(), "labels": ids.masked_fill(~learned, -100)}


def batches_by_length(
    examples: Iterator[tuple[list[int], T]],
    tokens: int,
    pad_id: int,
    seed: int = 0,
    collate: Callable[[list[tuple[list[int], T]], int], dict[str, Tensor]] = hide_prompts,
) -> Iterator[dict[str, Tensor]]:
    """Batches of about `tokens` tokens from examples (ids, what `collate` needs), each of like length."""
    rng = random.Random(seed)
    while pool := list(islice(examples, POOL)):
        pool.sort(key=lambda example: len(example[0]))
        batches, start = [], 0
        while start < len(pool):
            stop = start + 1
            while stop < len(pool) and len(pool[stop][0]) * (stop + 1 - start) <= tokens:
                stop += 1
            batches.append(pool[start:stop])
            start = stop
        rng.shuffle(batches)
        for batch in batches:
            yield collate(batch, pad_id)


def fit(
    model: Trained,
    batches: Iterator[dict[str, Tensor]],
    steps: int,
    learning_rate: float = 1e-3,
    warmup: int = 200,
    loss: Callable[[Trained, dict[str, Tensor]], Tensor] | None = None,
    progress: Progress | None = None,
) -> None:
    """Train all weights with AdamW, a linear warm-up and a cosine down to a tenth; the model ends in eval mode.

    Args:
        loss: of a batch; the model's own cross-entropy by default.
        progress: called after every step with (steps done, steps, mean loss of late).
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _rate(i, steps, warmup))
    loss = loss or (lambda model, batch: model(**batch, use_cache=False).loss)
    model.train()
    late = math.nan
    for i, batch in enumerate(islice(batches, steps)):
        value = loss(model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        late = value.item() if math.isnan(late) else 0.98 * late + 0.02 * value.item()
        if progress:
            progress(i + 1, steps, late)
    model.eval()


def _rate(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
