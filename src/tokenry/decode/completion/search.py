"""Beam search for the next name, and for the rest of a statement.

A model that `tokenry train --method codefill` has made reads values, and writes values; any other causal model reads
and writes the source itself. `Vocabulary` knows which tokens begin a name there, and which go on with one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...models.batch import left_padded, pad_id, position_arguments
from ...text.code.lexer import EOS

__all__ = ["Found", "Rest", "Vocabulary", "next_values", "rest_of_statement", "vocabulary_of"]

NAME = re.compile(r"[^\W\d]\w*\Z")
PIECE = re.compile(r"\w+\Z")
LONGEST = 12  # tokens of a name


@dataclass(frozen=True)
class Found:
    """What may stand next: its text, and its probability."""

    value: str
    probability: float


class Vocabulary:
    """The tokens of a tokenizer as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        self.tokenizer = tokenizer
        self.reads_values = tokenizer.eos_token == EOS
        special = set(tokenizer.all_special_ids)
        words = cast(list[str], tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer))))))
        self.texts = [
            None if i in special and not self.reads_values else _text_of(tokenizer, word, i in special)
            for i, word in enumerate(words)
        ]
        self.texts += [None] * (size - len(self.texts))
        self.special = special

    @cached_property
    def goes_on(self) -> Tensor:
        """(vocabulary,) bool: tokens that belong to the value that was begun."""
        if self.reads_values:
            return self._where(lambda i, text: i not in self.special and not text.startswith(" "))
        return self._where(lambda i, text: PIECE.match(text) is not None)

    @cached_property
    def goes_on_name(self) -> Tensor:
        """(vocabulary,) bool: of those, tokens that a name can hold."""
        return self.goes_on & self._where(lambda i, text: PIECE.match(text) is not None)

    @cached_property
    def whole(self) -> Tensor:
        """(vocabulary,) bool: tokens that are a value of their own, which nothing goes on with."""
        return self._where(lambda i, text: i in self.special)

    @cached_property
    def begins_value(self) -> Tensor:
        """(vocabulary,) bool: tokens that any value begins with."""
        return self._where(lambda i, text: i != self.tokenizer.pad_token_id) & ~self.goes_on

    @cached_property
    def begins_name(self) -> Tensor:
        """(vocabulary,) bool: tokens that a name or keyword begins with, a space before it or not."""
        return self._where(lambda i, text: i not in self.special and NAME.match(text.removeprefix(" ")) is not None)

    @cached_property
    def ends_statement(self) -> list[int]:
        """Tokens behind which a statement is complete."""
        if self.reads_values:
            return [cast(int, self.tokenizer.eos_token_id)]
        ends = [i for i, text in enumerate(self.texts) if text is not None and "\n" in text]
        return [*ends, *([] if self.tokenizer.eos_token_id is None else [cast(int, self.tokenizer.eos_token_id)])]

    def agreeing(self, begun: str, typed: str) -> Tensor:
        """(vocabulary,) bool: tokens with which the text begun still agrees with what was typed."""
        wanted = typed[len(begun) :]

        def agrees(i: int, text: str) -> bool:
            part = text if begun else text.removeprefix(" ")
            return part.startswith(wanted) or (bool(part) and wanted.startswith(part))

        return self._where(agrees)

    def _where(self, holds: Any) -> Tensor:
        return torch.tensor([text is not None and holds(i, text) for i, text in enumerate(self.texts)])


def _text_of(tokenizer: PreTrainedTokenizerBase, word: str, special: bool) -> str:
    """A token's text with the space it begins with."""
    if special:
        return " " + word
    spaced = word[:1] in ("Ġ", "▁")
    body = tokenizer.convert_tokens_to_string([word])
    return (" " + body.removeprefix(" ")) if spaced else body


@lru_cache(maxsize=4)
def vocabulary_of(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The vocabulary of a tokenizer, for a model of `size` logits."""
    return Vocabulary(tokenizer, size)


# --- names ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def next_values(
    model: PreTrainedModel,
    vocabulary: Vocabulary,
    contexts: Sequence[Sequence[int]],
    beam: int = 5,
    top_k: int = 10,
    names_only: bool = True,
    typed: str = "",
) -> list[list[Found]]:
    """The `top_k` likeliest values behind each context. A value is complete where its next token belongs to another.

    Args:
        contexts: token ids, none of them empty.
        beam: values of more than one token that are followed at a time.
        typed: what the value begins with.
    """
    ids, mask = left_padded(contexts, model.device, pad_id(vocabulary.tokenizer))
    output = model(input_ids=ids, attention_mask=mask.long(), **position_arguments(model, mask), use_cache=True)
    first = vocabulary.begins_name if names_only else vocabulary.begins_value
    if typed:
        first = first & vocabulary.agreeing("", typed)
    logp = output.logits[:, -1].float().log_softmax(-1)
    logp = logp.masked_fill(~first.to(logp.device), -torch.inf)
    search = _Search(model, vocabulary, mask, output.past_key_values, top_k, typed, names_only)
    search.begin(*logp.topk(min(top_k, logp.shape[-1]), -1))
    for _ in range(LONGEST):
        if not search.advance(beam):
            break
    return search.results()


class _Search:
    """Unfinished values of all rows, `width` of each, and the finished ones."""

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        mask: Tensor,
        cache: Any,
        top_k: int,
        typed: str,
        names: bool,
    ) -> None:
        self.model, self.vocabulary, self.mask, self.cache = model, vocabulary, mask, cache
        self.top_k, self.typed, self.rows = top_k, typed, len(mask)
        self.follows = vocabulary.goes_on_name if names else vocabulary.goes_on
        self.done: list[dict[str, float]] = [{} for _ in range(self.rows)]

    def begin(self, scores: Tensor, tokens: Tensor) -> None:
        width = tokens.shape[1]
        self.cache.batch_repeat_interleave(width)
        self.mask = self.mask.repeat_interleave(width, 0)
        self.ids = [[token] for token in tokens.flatten().tolist()]
        self.scores = scores.flatten().clone()
        for i, (token,) in enumerate(self.ids):
            if self.vocabulary.whole[token] and self.scores[i] > -torch.inf:
                self._finish(i, float(self.scores[i]))
                self.scores[i] = -torch.inf

    def advance(self, beam: int) -> bool:
        """One token further; False when nothing unfinished can be among the best any more."""
        if not self._is_open():
            return False
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        last = torch.tensor([row[-1:] for row in self.ids], device=self.mask.device)
        places = {name: where[:, -1:] for name, where in position_arguments(self.model, self.mask).items()}
        output = self.model(
            input_ids=last, attention_mask=self.mask.long(), past_key_values=self.cache, use_cache=True, **places
        )
        logp = output.logits[:, -1].float().log_softmax(-1) + self.scores[:, None]
        goes_on = self.vocabulary.goes_on.to(logp.device)
        ends = logp.masked_fill(goes_on, -torch.inf).logsumexp(-1)
        for i, score in enumerate(ends.tolist()):
            if score > -torch.inf:
                self._finish(i, score)
        self._keep(logp.masked_fill(~self.follows.to(logp.device), -torch.inf), beam)
        return True

    def _keep(self, logp: Tensor, beam: int) -> None:
        """The best unfinished values of each row."""
        if self.typed:
            allowed = {text: self.vocabulary.agreeing(text, self.typed) for text in map(self._text, self.ids)}
            agree = torch.stack([allowed[self._text(row)] for row in self.ids])
            logp = logp.masked_fill(~agree.to(logp.device), -torch.inf)
        size = logp.shape[-1]
        width = len(self.ids) // self.rows
        scores, flat = logp.view(self.rows, width * size).topk(min(beam, width * size), -1)
        parents = (flat // size + torch.arange(self.rows, device=flat.device)[:, None] * width).flatten()
        self.ids = [[*self.ids[p], t] for p, t in zip(parents.tolist(), (flat % size).flatten().tolist())]
        self.scores, self.mask = scores.flatten(), self.mask[parents]
        self.cache.reorder_cache(parents)

    def _is_open(self) -> bool:
        best = self.scores.view(self.rows, -1).amax(-1).tolist()
        return any(score > self._least(row) for row, score in enumerate(best))

    def _least(self, row: int) -> float:
        """The score that a value must exceed to be among the best of its row."""
        known = sorted(self.done[row].values(), reverse=True)
        return known[self.top_k - 1] if len(known) >= self.top_k else -torch.inf

    def _text(self, ids: Sequence[int]) -> str:
        return "".join(cast(str, self.vocabulary.texts[i]) for i in ids).removeprefix(" ")

    def _finish(self, i: int, score: float) -> None:
        text = self._text(self.ids[i])
        if text.startswith(self.typed) and "\ufffd" not in text:
            row = self.done[i // (len(self.ids) // self.rows)]
            row[text] = float(torch.logaddexp(torch.tensor(row.get(text, -torch.inf)), torch.tensor(score)))

    def results(self) -> list[list[Found]]:
        best = (sorted(row.items(), key=lambda item: -item[1])[: self.top_k] for row in self.done)
        return [[Found(text, min(1.0, float(torch.tensor(score).exp()))) for text, score in row] for row in best]


# --- statements ----------------------------------------------------------------------------------------------------


class _Agrees(LogitsProcessor):
    """Leaves only tokens that agree with what was typed, until all of it is there."""

    def __init__(self, vocabulary: Vocabulary, typed: str, start: int) -> None:
        self.vocabulary, self.typed, self.start = vocabulary, typed, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, ids in enumerate(input_ids[:, self.start :].tolist()):
            begun = "".join(self.vocabulary.texts[i] or "" for i in ids).removeprefix(" ")
            if len(begun) < len(self.typed):
                agree = self.vocabulary.agreeing(begun, self.typed).to(scores.device)
                scores[row] = scores[row].masked_fill(~agree, -torch.inf)
        return scores


class Rest(NamedTuple):
    """The likeliest rest of a statement: its tokens without what ends it, its probability, and forward passes."""

    ids: list[int]
    probability: float
    forwards: int


@torch.no_grad()
def rest_of_statement(
    model: PreTrainedModel, vocabulary: Vocabulary, context: Sequence[int], beam: int, most: int, typed: str = ""
) -> Rest:
    """What goes on behind a context up to the end of the statement, of at most `most` tokens."""
    ids = torch.tensor([list(context)], device=model.device)
    output = cast(Any, model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            num_beams=beam,
            do_sample=False,
            max_new_tokens=most,
            eos_token_id=vocabulary.ends_statement,
            pad_token_id=pad_id(vocabulary.tokenizer),
            length_penalty=0.0,  # the likeliest one, not the likeliest a token
            return_dict_in_generate=True,
            output_scores=True,
        ),
        logits_processor=LogitsProcessorList([_Agrees(vocabulary, typed, len(context))] if typed else []),
    )
    ends = set(vocabulary.ends_statement)
    new = output.sequences[0, len(context) :].tolist()
    cut = next((i for i, token in enumerate(new) if token in ends), len(new))
    steps = cast(Any, model).compute_transition_scores(
        output.sequences, output.scores, getattr(output, "beam_indices", None), normalize_logits=beam == 1
    )
    finite = steps[0][steps[0] > -torch.inf]
    return Rest(new[:cut], min(1.0, float(finite.sum().exp())), len(output.scores))
