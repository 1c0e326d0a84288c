"""Beginnings of one text that a model goes on with as one batch; what they have in common is computed once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...models.batch import left_padded, pad_id, position_ids
from ...models.kv_cache import gather_columns, held_columns, new_cache
from ...read.anchors.rollouts import first_token

__all__ = ["Beginnings"]


@dataclass(frozen=True)
class Beginnings:
    """Left-padded rows, for a model to go on with; `texts` is what stands behind the beginnings.

    Attributes:
        ids, mask: (rows, time), the mask False at padding and at special tokens that were written.
        cache: keys and values of the first columns; `written` uses it up.
        begun: columns of the beginnings.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ids: Tensor
    mask: Tensor
    cache: Any
    begun: int

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Tensor, lengths: Sequence[int]
    ) -> Beginnings:
        """The first tokens of a text (time,), so many in each row.

        Raises:
            InputError: a model without a key-value cache.
        """
        rows = [text[:length].tolist() or [first_token(tokenizer)] for length in lengths]
        ids, mask = left_padded(rows, model.device, pad_id(tokenizer))
        cache, width = new_cache(model), ids.shape[1]
        if cache is None:
            raise InputError(f"{type(model).__name__} takes no key-value cache; use a model that does")
        if width > 1:
            with torch.no_grad():
                model(text[None, : width - 1].to(model.device), past_key_values=cache, logits_to_keep=1)
            cache.batch_repeat_interleave(len(rows))
            gather_columns(cache, position_ids(mask)[:, :-1])  # padding gets a column, too, that is masked
        return cls(model, tokenizer, ids, mask, cache, width)

    def then(self, words: Sequence[int]) -> Beginnings:
        """With the same tokens behind every row."""
        more = torch.tensor(words, device=self.ids.device).expand(len(self.ids), -1)
        mask = torch.cat([self.mask, torch.ones_like(more, dtype=torch.bool)], 1)
        return replace(self, ids=torch.cat([self.ids, more], 1), mask=mask)

    def repeated(self, count: int) -> Beginnings:
        """Every row so many times; what is not in the cache yet, but for the last token, is run before."""
        cache, held = copy.deepcopy(self.cache), held_columns(self.cache)
        if held < self.ids.shape[1] - 1:
            places = position_ids(self.mask)[:, held:-1]
            mask = self.mask[:, :-1].long()
            with torch.no_grad():
                self.model(self.ids[:, held:-1], mask, position_ids=places, past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(count)
        ids, mask = (rows.repeat_interleave(count, 0) for rows in (self.ids, self.mask))
        return replace(self, ids=ids, mask=mask, cache=cache)

    def written(self, tokens: int, **how: Any) -> Beginnings:
        """With so many tokens more, drawn from the seed 0 as `generate` is told."""
        options = {"max_new_tokens": tokens, "pad_token_id": pad_id(self.tokenizer), "return_dict_in_generate": True}
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(0)
            made = cast(Any, self.model).generate(
                self.ids, attention_mask=self.mask.long(), past_key_values=self.cache, **options, **how
            )
        special = torch.tensor(self.tokenizer.all_special_ids, device=self.ids.device)
        said = ~torch.isin(made.sequences[:, self.ids.shape[1] :], special)
        return replace(self, ids=made.sequences, mask=torch.cat([self.mask, said], 1), cache=made.past_key_values)

    @property
    def texts(self) -> list[str]:
        """What stands behind the beginning of each row, without special tokens."""
        return self.tokenizer.batch_decode(self.ids[:, self.begun :], skip_special_tokens=True)
