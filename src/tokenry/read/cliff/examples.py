"""Prompts with the thinking of a model: what they are labeled, and the text up to where the answer would begin."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.files import records_of
from ...hooks.last_states import last_states
from ...learned.linear_probe import LEAST, state_number
from ...models.batch import left_padded, pad_id, position_arguments
from ...models.positions import check_prompt_fits
from ...models.prompts import rendered
from ...text.token_text import check_encodable
from ...text.words import listed
from ...trace.trace import Trace, capture

__all__ = [
    "MARKERS",
    "REFUSALS",
    "Example",
    "balanced",
    "end_states",
    "examples_in",
    "is_refusal",
    "text_of",
    "traced",
]

MARKERS = ("<think>", "</think>")
BATCH = 16  # texts at a time
SHORTEST = 10  # characters of thinking
BEGINNING = 32  # characters of a response in which a refusal shows
REFUSALS = (  # no "however", "safe" or "legal", which helpful answers have as well
    "sorry",
    "i apologize",
    "i cannot",
    "i can't",
    "i can not",
    "i won't",
    "i will not",
    "i'm unable",
    "i am unable",
    "i'm not able",
    "i am not able",
    "i must decline",
    "i refuse",
    "i must refuse",
)


class Example(NamedTuple):
    """A prompt, what was thought of it, and whether the response was a refusal (1) or not (0)."""

    prompt: str
    thinking: str
    label: int


def is_refusal(response: str) -> bool:
    """Whether one of `REFUSALS` occurs in the first 32 characters."""
    start = " ".join(response.split())[:BEGINNING].lower().replace("’", "'")
    return any(phrase in start for phrase in REFUSALS)


def examples_in(text: str, path: str) -> list[Example]:
    """The examples of a file of JSON lines; thinking of 10 characters or less is left out."""
    remedy = 'give lines like {"prompt": "...", "thinking": "...", "response": "..."}, or with "label": 0 or 1'
    rows = records_of(text, path, "examples", remedy, _example_of)
    return [row for row in rows if len(row.thinking) > SHORTEST]


def _example_of(row: dict[str, Any], where: str) -> Example:
    texts = {name: row.get(name) for name in ("prompt", "thinking")}
    for name, value in texts.items():
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{where} has the {name} {value!r}; give some text")
        check_encodable(value, where)
    label, response = row.get("label"), row.get("response")
    if (label is None) == (response is None):
        raise InputError(f"{where} has both a label and a response, or neither; give one of them")
    if response is not None:
        if not isinstance(response, str):
            raise InputError(f"{where} has the response {response!r}; give it as text")
        label = int(is_refusal(response))
    if isinstance(label, bool) or label not in (0, 1):
        raise InputError(f"{where} has the label {label!r}; give 1 for a refusal and 0 for another response")
    return Example(str(texts["prompt"]), str(texts["thinking"]), label)


def balanced(examples: Sequence[Example], most: int, seed: int) -> list[Example]:
    """As many examples of both classes, at most `most` of each, drawn by the seed.

    Raises:
        InputError: fewer than 10 of a class.
    """
    classes = [[example for example in examples if example.label == label] for label in (0, 1)]
    for label, found in enumerate(classes):
        if len(found) < LEAST:
            raise InputError(
                f"{len(found)} examples have the label {label} ({('no refusal', 'refusal')[label]}) and more than "
                f"{SHORTEST} characters of thinking; give at least {LEAST} of each class"
            )
    count, rng = min(most, *map(len, classes)), random.Random(seed)
    drawn = [example for found in classes for example in rng.sample(found, count)]
    return rng.sample(drawn, len(drawn))


def text_of(tokenizer: PreTrainedTokenizerBase, prompt: str, thinking: str) -> str:
    """Prompt and thinking in the chat template, up to where the answer begins. The opening marker is written unless the
    template ends with it.

    Raises:
        InputError: a tokenizer without a chat template, or no thinking.
    """
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template; use a reasoning model that has one")
    if not thinking.strip():
        raise InputError(f"the thinking {thinking!r} is empty; give what the model thought of the prompt")
    opening, closing = MARKERS
    asked = rendered(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
    opened = "" if asked.rstrip().endswith(opening) else f"{opening}\n"
    return f"{asked}{opened}{thinking.strip()}\n{closing}\n\n"


@torch.no_grad()
def traced(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    layer: int,
    batch_size: int = BATCH,
) -> Iterator[Trace]:
    """A trace with the hidden state `layer` of each text, which is read as it stands."""
    for ids, mask in _batches(model, tokenizer, texts, batch_size):
        with capture(model, tokenizer, hidden=[layer]) as cap:
            model(ids, attention_mask=mask.long(), use_cache=False, logits_to_keep=1, **position_arguments(model, mask))
        yield from cap.traces


@torch.no_grad()
def end_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], layer: int) -> Tensor:
    """The hidden states `layer` (texts, width) at the last token of each text, float32 on the CPU."""
    wanted, found = [state_number(model, layer)], []
    for ids, mask in _batches(model, tokenizer, texts, BATCH):
        found.append(last_states(model, ids, mask, wanted, final_norm=False)[:, 0].float().cpu())
    return torch.cat(found)


def _batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Left-padded ids and mask (batch, time)."""
    texts = listed(texts, "text")
    for start in range(0, len(texts), size):
        rows = [tokenizer.encode(text, add_special_tokens=False) for text in texts[start : start + size]]
        if not all(rows):
            raise InputError("a text has no tokens; give some text to read")
        check_prompt_fits(model, max(map(len, rows)))
        yield left_padded(rows, model.device, pad_id(tokenizer))
