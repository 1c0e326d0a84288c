"""Sentence embeddings from a prompt: the state of a decoder's last token after "... means in one word:".

`PromptEmbedder` is the plain method (PromptEOL and its relatives) and carries Token Prepending when it is given one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.progress import Progress
from ...hooks.last_states import last_states
from ...models.anatomy import decoder_layers
from ...models.batch import left_padded, pad_id
from ...models.positions import context_window
from ...text.token_text import check_encodable
from .batches import by_length, check_sentences

__all__ = ["PROMPTS", "PromptEmbedder", "clean_up", "leads_with_bos", "read_prompt"]

SLOT, TEXT = "{slot}", "{text}"
END = f'{SLOT} "{TEXT}" means in one word:"'
QUESTIONS = (  # MetaEOL: eight tasks, in our own words
    "Sort the text into one general category, such as sports, science or politics.",
    "Decide whether the text states a fact or an opinion.",
    "Rate how content the writer of this review is, from very bad to very good.",
    "Name the emotion that the text expresses.",
    "Decide which other sentences say the same as this one.",
    "Find a word that could replace the most important word of the text in its context.",
    "Pick out the key fact of the text.",
    "Name the scientific things in the text and how they relate.",
)
PROMPTS: dict[str, tuple[str, ...]] = {
    "prompteol": (f"This sentence : {END}",),
    "cot": (f"After thinking step by step , this sentence : {END}",),
    "ke": (
        "The essence of a sentence is often captured by its main subjects and actions, while descriptive terms "
        f"provide additional but less central details. With this in mind , this sentence : {END}",
    ),
    "metaeol": tuple(f"{question} For this task , this sentence : {END}" for question in QUESTIONS),
}


class Slot(AbstractContextManager, Protocol):
    """A context in which forwards are edited around the slot token."""

    slot_token_id: int


class Prepends(Protocol):
    """A method that edits a model's forwards around a slot, such as `TokenPrepending`."""

    def __call__(self, model: PreTrainedModel, slot_token_id: int | None = None) -> Slot:
        """The context in which it acts."""
        ...

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Its parameters."""
        ...


def read_prompt(prompt: str) -> tuple[str, ...]:
    """The templates that a prompt's name or a template stands for.

    Raises:
        InputError: neither a known name nor a template with one {slot} and, after it, one {text}.
    """
    if prompt in PROMPTS:
        return PROMPTS[prompt]
    slots, texts = prompt.count(SLOT), prompt.count(TEXT)
    if (slots, texts) != (1, 1):
        raise InputError(
            f"prompt={prompt!r} has {slots} {SLOT} and {texts} {TEXT}; give one of {', '.join(PROMPTS)}, "
            "or a template with exactly one of each"
        )
    if prompt.index(SLOT) > prompt.index(TEXT):
        raise InputError(f"prompt={prompt!r} has its {SLOT} after its {TEXT}; put the slot before the text")
    return (prompt,)


def clean_up(text: str) -> str:
    """A text as the templates expect it: single spaces, a mark at the end, no double quotes, no final question mark.

    The empty text stays empty.
    """
    text = " ".join(text.split())
    if not text:
        return text
    if text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text[-1] == "?" else text


class PromptEmbedder(nn.Module):
    """Sentence embeddings: each text in a prompt, read at the last token.

        PromptEmbedder(model, tokenizer).encode(["A dog runs.", "A cat sleeps."])    # (2, width)

    Args:
        prompt: a name of PROMPTS or a template with one {slot} and one {text}; without Token Prepending the slot is
            left out. With several templates (metaeol) the embedding is the mean over them.
        token_prepending: the method to apply; None is the plain baseline.
        output_layer: which state to read, counted as `hidden_states` in transformers: k is the output after k layers,
            -1 the one after the final norm. Layers behind it do not run.
        add_bos: put the BOS token first; None does what the tokenizer does by itself.
        normalize: scale every embedding to length 1.
        max_seq_length: tokens of a text with its prompt at most; None is what the model takes. Can be set later.
        truncate: cut a longer text at its end, the prompt stays whole; else it is refused, and nothing is embedded.

    Raises:
        InputError: a bad prompt, a max_seq_length out of range, an output layer the model does not have, or a BOS token
            the tokenizer does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt: str = "prompteol",
        token_prepending: Prepends | None = None,
        output_layer: int = -1,
        add_bos: bool | None = None,
        normalize: bool = False,
        max_seq_length: int | None = None,
        truncate: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.tokenizer, self.token_prepending = model, tokenizer, token_prepending
        self.prompt, self.add_bos, self.normalize, self.truncate = prompt, add_bos, normalize, truncate
        self.templates = read_prompt(prompt)
        self.layers = len(decoder_layers(model))
        self.limit: int | None = context_window(model)
        self.max_seq_length = max_seq_length
        self.output_layer = self._layer(output_layer)
        self.slot_token_id: int | None = None
        if token_prepending is not None:
            self.slot_token_id = token_prepending(model).slot_token_id
        bos = leads_with_bos(tokenizer) if add_bos is None else add_bos
        if bos and tokenizer.bos_token_id is None:
            raise InputError("add_bos=True, but the tokenizer has no BOS token; give add_bos=False")
        self._start = [cast(int, tokenizer.bos_token_id)] if bos else []

    def _layer(self, index: int) -> int:
        if not -self.layers - 1 <= index <= self.layers:
            raise InputError(
                f"output_layer={index} does not exist; this model has {self.layers} layers, "
                f"give {-self.layers - 1} to {self.layers}"
            )
        return index % (self.layers + 1)

    @property
    def max_seq_length(self) -> int | None:
        """Tokens of a text with its prompt at most; None where neither the model nor the user has a limit."""
        return self.limit if self._longest is None else self._longest

    @max_seq_length.setter
    def max_seq_length(self, tokens: int | None) -> None:
        if tokens is not None and not 1 <= tokens <= (self.limit or tokens):
            raise InputError(
                f"max_seq_length={tokens} is not allowed; give a number of tokens from 1 to what the model takes, "
                f"{self.limit or 'which has no limit'}, or None for that"
            )
        self._longest = tokens

    # --- texts to ids ------------------------------------------------------------------------------------------

    def rows(self, texts: Sequence[str]) -> list[tuple[list[int], ...]]:
        """Token ids of every text in every template: `rows[text][template]`."""
        texts = [texts] if isinstance(texts, str) else texts
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"text {i} is a {type(text).__name__}; give a list of strings")
            if SLOT in text:
                raise InputError(f"text {i} contains {SLOT!r}, which marks the slot in templates; remove it")
            check_encodable(text, f"text {i}")
        cleaned = [clean_up(text) for text in texts]
        if not all(cleaned):
            warnings.warn(f"text {cleaned.index('')} is empty and becomes a pair of empty quotes", stacklevel=3)
        made, most = self._variants(cleaned), self.max_seq_length
        for i, variants in enumerate(made):
            longest = max(map(len, variants))
            if most is None or longest <= most:
                continue
            if not self.truncate:
                where = "the model takes" if self._longest is None else "max_seq_length is"
                raise InputError(
                    f"text {i} has {longest} tokens with its prompt, {where} {most}; shorten it, or cut long texts "
                    "with truncate=True (--truncate)"
                )
            made[i] = self._cut(cleaned[i], most)
        return made

    def _variants(self, texts: Sequence[str]) -> list[tuple[list[int], ...]]:
        """Each text in every template."""
        return list(zip(*(self._fill(template, texts) for template in self.templates)))

    def _cut(self, text: str, most: int) -> tuple[list[int], ...]:
        """The beginning of a text, as long as it fits into every template with at most so many tokens."""
        fits, fails, found = 0, len(text), None
        while fails - fits > 1:
            middle = (fits + fails) // 2
            (variants,) = self._variants([clean_up(text[:middle])])
            if max(map(len, variants)) <= most:
                fits, found = middle, variants
            else:
                fails = middle
        if found is None:
            raise InputError(f"max_seq_length={most} leaves no room for a text in its prompt; raise it")
        return found

    def _fill(self, template: str, texts: Sequence[str]) -> list[list[int]]:
        # The halves around the slot are tokenized on their own, as a tokenizer does around an added token.
        if self.slot_token_id is None:
            lead, rest = [], template.replace(f"{SLOT} ", "").replace(SLOT, "")
        else:
            before, _, rest = template.partition(SLOT)
            lead = [*self._ids([before])[0], self.slot_token_id]
        head, _, tail = rest.partition(TEXT)
        return [[*self._start, *lead, *ids] for ids in self._ids([head + text + tail for text in texts])]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False).input_ids

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, (templates * texts, time), template by template, padded on the left."""
        return self._pad(self.rows(texts))

    def _pad(self, rows: Sequence[Sequence[list[int]]]) -> dict[str, Tensor]:
        flat = [ids for variants in zip(*rows) for ids in variants]
        ids, mask = left_padded(flat, pad=pad_id(self.tokenizer))
        return {"input_ids": ids, "attention_mask": mask.long()}

    # --- ids to vectors ----------------------------------------------------------------------------------------

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(texts, width) from what `tokenize` gives."""
        states = self._states(input_ids, attention_mask, [self.output_layer])[:, 0]
        return nn.functional.normalize(states, dim=-1) if self.normalize else states

    def _states(self, ids: Tensor, mask: Tensor, wanted: Sequence[int]) -> Tensor:
        """(texts, len(wanted), width), the mean over templates."""
        method = self.token_prepending
        with nullcontext() if method is None else method(self.model, self.slot_token_id):
            states = last_states(self.model, ids, mask, wanted)
        return states.unflatten(0, (len(self.templates), -1)).mean(0) if len(self.templates) > 1 else states

    def encode(self, sentences: Sequence[str], batch_size: int = 16, progress: Progress | None = None) -> Tensor:
        """(sentences, width), float32 on the CPU, in the order given. `progress` gets (done, all) after a batch."""
        states = self.encode_layers(sentences, [self.output_layer], batch_size, progress)[:, 0]
        return nn.functional.normalize(states, dim=-1) if self.normalize else states

    @torch.no_grad()
    def encode_layers(
        self,
        sentences: Sequence[str],
        layers: Sequence[int] | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
    ) -> Tensor:
        """(sentences, layers, width): the states that several output layers would give, from one pass each.

        Args:
            layers: default all, 0 to the number of layers.

        Raises:
            InputError: a single string, no sentences, a batch size below 1, a layer the model does not have, or a
                text that does not fit.
        """
        check_sentences(sentences, batch_size)
        wanted = range(self.layers + 1) if layers is None else [self._layer(k) for k in layers]
        rows = self.rows(sentences)

        def embed(places: list[int]) -> Tensor:
            ids, mask = (t.to(self.model.device) for t in self._pad([rows[i] for i in places]).values())
            return self._states(ids, mask, wanted).float().cpu()

        return by_length([max(map(len, row)) for row in rows], batch_size, embed, progress)


def leads_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its BOS token before a text by itself."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]
