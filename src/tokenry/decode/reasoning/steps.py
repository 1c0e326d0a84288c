"""What reasoning in steps needs of a model: a batch of texts that it reads, judges and writes on.

Text is exchanged, never ids: models with different vocabularies work on the same steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.logits_process import (
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WatermarkLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from ...core.errors import InputError
from ...models.batch import left_padded, shared_length
from ...models.load import Loaded
from ...models.positions import context_window
from ...text.token_text import TokenText
from ...text.words import listed
from ..engines.choice import open_engine
from ..generation.options import check_config, kept_by_generate
from ..generation.sampler import WARPERS, Sampler

__all__ = ["Draft", "StepModel"]

STEPWISE = (  # processors of transformers that look at the ids alone, and not at where the prompt ended
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WatermarkLogitsProcessor,
)
LIBRARY = LogitsProcessor.__module__
GENERATES_OWN = {"attention_mask", "logits_to_keep", "past_key_values", "position_ids", "use_cache"}


@dataclass(frozen=True)
class Draft:
    """A step as a model has written it: without its separator, and how many tokens that took, the end included."""

    text: str
    tokens: int
    end: Literal["separator", "eos", "length"]


class StepModel:
    """A model on a batch of texts, with a cache of what it has read of each.

    Rows are named by their numbers. What a new text shares with the cache from the beginning on is not read again, and
    the rest of the cache is taken back: a judging turn and a rejected step vanish with the next text.

    Args:
        starts: the text that every row begins with.
        special: let the tokenizer add its special tokens; a chat template has put them there already.
        seed: of sampling; every row has its own generator. None: torch's global one.
        options: what `generate` takes.
    """

    def __init__(
        self,
        loaded: Loaded,
        starts: Sequence[str],
        special: bool = False,
        seed: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.tokenizer = loaded
        self.special = special
        starts = listed(starts, "start")
        processors, config, self.eos = prepared(self.model, options or {})
        device = self.model.device
        self.sampler = Sampler(processors, config.do_sample, seed, len(starts), device)
        self.engine = open_engine(self.model)
        self.starts = [self.encode(text) for text in starts]
        self.held: list[list[int]] = [[] for _ in starts]  # the tokens in the cache
        self.fed = [0] * len(starts)
        self.window = context_window(self.model)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=self.special)

    def room(self, text: str) -> float:
        """How many tokens the context window has left after this text."""
        return float("inf") if self.window is None else self.window - len(self.encode(text))

    def read(self, texts: Mapping[int, str]) -> Tensor:
        """Logits of the token after each text (batch, vocab); rows without a text have meaningless ones."""
        wanted = {row: self.encode(text) for row, text in texts.items()}
        if self.engine.columns == 0:  # a row of padding alone would have nothing to attend to
            wanted |= {row: ids for row, ids in enumerate(self.starts) if row not in wanted}
        blocks = {}
        for row, ids in wanted.items():
            held = self.held[row]
            shared = shared_length(held, ids[:-1])  # the last token is fed in any case, for its logits
            self.engine.rollback(row, len(held) - shared)
            del held[shared:]
            blocks[row] = ids[shared:]
        return self._feed(blocks)

    def write(self, texts: Mapping[int, str], limits: Mapping[int, int], separator: str) -> dict[int, Draft]:
        """Continue each text by one step of at most `limits[row]` tokens."""
        logits = self.read(texts)
        decoded = {row: TokenText(self.tokenizer, self.held[row], skip_special=False) for row in texts}
        drafts: dict[int, Draft] = {}
        while True:
            following = {}
            for row, text in decoded.items():
                if row in drafts:
                    continue
                token = self._draw(row, logits[row])
                draft = self._ended(text, token, limits[row], separator)
                if draft:
                    drafts[row] = draft
                else:
                    following[row] = [token]
            if not following:
                return drafts
            logits = self._feed(following)

    def _draw(self, row: int, logits: Tensor) -> int:
        ids = torch.tensor([self.held[row]], device=logits.device)
        return self.sampler.redraw(row, ids, logits, 0, False)[0]

    def _ended(self, text: TokenText, token: int, limit: int, separator: str) -> Draft | None:
        count = len(text.ids) + 1
        if token in self.eos:
            return Draft(text.text, count, "eos")
        text.append(token)
        step, found, _ = text.text.partition(separator)
        if found:
            return Draft(step, count, "separator")
        return Draft(step, count, "length") if count >= limit else None

    def _feed(self, blocks: Mapping[int, list[int]]) -> Tensor:
        """Feed each row its own tokens, right-aligned; rows without any are padding."""
        tokens, mask = left_padded([blocks.get(row, []) for row in range(len(self.held))], self.model.device)
        for row, block in blocks.items():
            self.held[row] += block
            self.fed[row] += len(block)
        return self.engine.forward(tokens, None if bool(mask.all()) else mask)


def prepared(
    model: PreTrainedModel, options: Mapping[str, Any]
) -> tuple[LogitsProcessorList, GenerationConfig, set[int]]:
    """What `generate` makes of its options on this model: logits processors, configuration, end-of-text ids."""

    def take(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Sequence[Any],
        generation_config: GenerationConfig,
        **further: Any,
    ) -> tuple[LogitsProcessorList, GenerationConfig, set[int]]:
        kept = kept_by_generate("streamer", "assistant_model", "synced_gpus")
        check_config(generation_config, **kept)
        check_stepwise(logits_processor, stopping_criteria, generation_config, {*kept, *further})
        ends = [c.eos_token_id.tolist() for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        return logits_processor, generation_config, {token for ids in ends for token in ids}

    if options.get("stop_strings"):
        raise InputError("stop_strings are not possible here: steps end with their separator; leave them out")
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    ones = torch.ones_like(ids)
    return cast(Any, model).generate(
        ids, attention_mask=ones, custom_generate=take, **{"use_cache": True, **options, "max_new_tokens": 1}
    )


def check_stepwise(
    processors: Sequence[LogitsProcessor], criteria: Sequence[Any], config: GenerationConfig, given: set[str]
) -> None:
    """Refuse what counts from the beginning of a text, or ends one: texts are written step by step, in turns."""
    others = [p for p in processors if not isinstance(p, WARPERS + STEPWISE) and type(p).__module__ == LIBRARY]
    others += [c for c in criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)]
    names = [type(one).__name__ for one in others] + sorted(given - GENERATES_OWN)
    if config.num_return_sequences > 1:
        names.append("num_return_sequences")
    if config.cache_implementation is not None:
        names.append("cache_implementation")
    if names:
        raise InputError(f"{names[0]} is not possible where models write step by step; leave it out")
