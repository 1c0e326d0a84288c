"""The value of a dead end: for every next token, how likely the text that goes on with it ends undesired.

Paper: Systematic Rectification of Language Models via Dead-end Analysis, arXiv 2302.14003. A text is an episode: the
prefix is the state, the next token the action, and the only reward is -1 at the end of a text that is undesired.
Without discount Q(prefix, token) is minus the probability of that end, a number in [-1, 0]. A prefix whose every Q is
-1 is a dead end. `tokenry.train.Rectifier` trains this model, `tokenry.decode.Rectification` reads it.
"""

from __future__ import annotations

import inspect
import json
import re
from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..core.artifact import Artifact, Folder, Header
from ..core.errors import InputError
from ..core.hashes import digest
from ..core.schemas import Fields
from ..core.tensors import with_weights
from ..models.batch import position_ids
from ..models.kv_cache import key_layers, layer_lengths, remove_last
from ..models.masks import sees_both_sides

__all__ = ["DeadEndValueModel", "DeadEndValues", "ValueCache", "vocabulary_hash"]

DEPTH = re.compile("(num|n)_(hidden_)?layers?|(en|de)coder_layers")  # what configs call their layers


class TrunkConfig(Fields):
    """The config of the trunk, as transformers writes it."""

    model_type: str


class RectifierHeader(Header):
    """What a saved rectifier says of itself."""

    vocabulary: str
    special_ids: dict[str, int | None]
    hidden_mult: int = Field(ge=1, lt=2**16)
    trunk: TrunkConfig


class DeadEndValues(NamedTuple):
    """Q of every next token after every token, (batch, time, vocab), float32: the head's, and the averaged head's."""

    q: Tensor
    target_q: Tensor


class DeadEndValueModel(Artifact, nn.Module):
    """A causal trunk with a Q head over the vocabulary, and an averaged copy of that head for training targets.

    Args:
        trunk: a causal transformer; a language model head on it is left out.
        hidden_mult: width of the head's hidden layer, in widths of the trunk.

    It is made for a vocabulary (see `bind`), not for one model. Loaded, it is in eval mode.
    """

    kind = "rectifier"
    layout = Folder("rectifier.safetensors", "rectifier.json")
    fields = RectifierHeader
    remedy = "give one written by DeadEndValueModel.save"
    unread = "the folder {path!r} holds no {kind} that can be read"
    unbound = "the rectifier is not bound to a tokenizer; call bind(tokenizer) before save"
    stranger = (
        "the rectifier was made for the vocabulary {fingerprint} ({tokens} tokens), this tokenizer has {found} ({here} "
        "tokens); train a rectifier with this model's tokenizer"
    )
    errors = (StrictDataclassError,)
    trunk: PreTrainedModel

    def __init__(self, trunk: PreTrainedModel, hidden_mult: int = 2) -> None:
        super().__init__()
        if hidden_mult < 1:
            raise InputError(f"hidden_mult={hidden_mult} is not allowed; give a whole number >= 1")
        if hasattr(trunk, "get_base_model"):
            raise InputError("the trunk has adapters, which are not saved with it; call merge_and_unload() first")
        if trunk.config.is_encoder_decoder or sees_both_sides(trunk):
            raise InputError(f"{type(trunk).__name__} is bidirectional, but the trunk must be causal; use a decoder")
        self.trunk, self.hidden_mult = cast(PreTrainedModel, trunk.base_model), hidden_mult
        config = trunk.config.get_text_config()
        hidden = hidden_mult * config.hidden_size
        self.vocab_size = config.vocab_size
        self.q_head = nn.Sequential(
            nn.Linear(config.hidden_size, hidden), nn.ReLU(), nn.Linear(hidden, config.vocab_size)
        )
        self.target_head = deepcopy(self.q_head).requires_grad_(False)
        self.takes_positions = "position_ids" in inspect.signature(self.trunk.forward).parameters
        self.vocabulary: str | None = None  # hash of the tokenizer's, see `bind`
        self.special_ids: dict[str, int | None] = {}

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> DeadEndValues:
        """Q for ids (batch, time), padded anywhere the mask is 0; no gradient flows into `target_q`."""
        hidden = self.hidden(input_ids, attention_mask)
        with torch.no_grad():
            target = self.target_head(hidden)
        return DeadEndValues(self.q_head(hidden).float(), target.float())

    def hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values: DynamicCache | None = None
    ) -> Tensor:
        """Last hidden states (batch, new, width) of the newest ids; the mask covers what is cached too."""
        inputs = {"past_key_values": past_key_values, "use_cache": past_key_values is not None}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask.long()
            if self.takes_positions:
                positions = position_ids(attention_mask)
                inputs["position_ids"] = positions[:, -input_ids.shape[1] :]
        return self.trunk(input_ids=input_ids, **inputs, return_dict=True).last_hidden_state

    @torch.no_grad()
    def update_target(self, rate: float) -> None:
        """Move the averaged head toward the head by `rate` (Polyak); 1 copies it."""
        for old, new in zip(self.target_head.parameters(), self.q_head.parameters()):
            old.lerp_(new, rate)

    # --- whose vocabulary it is ----------------------------------------------------------------------------

    def bind(self, tokenizer: PreTrainedTokenizerBase) -> DeadEndValueModel:
        """Remember the tokenizer whose ids this model reads; returns itself."""
        if len(tokenizer) > self.vocab_size:
            raise InputError(
                f"the tokenizer has {len(tokenizer)} tokens, the rectifier's trunk only {self.vocab_size}; build the "
                "trunk with the tokenizer's vocabulary"
            )
        self.vocabulary = vocabulary_hash(tokenizer)
        self.special_ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
        return self

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer with another vocabulary."""
        if self.made_for is None:
            raise InputError("the rectifier is not bound to a tokenizer; call bind(tokenizer) before using it")
        self.check_made_for(vocabulary_hash(tokenizer), here=len(tokenizer))

    @property
    def made_for(self) -> dict[str, Any] | None:
        """The vocabulary; None before `bind`."""
        return None if self.vocabulary is None else {"fingerprint": self.vocabulary, "tokens": self.vocab_size}

    # --- storage -------------------------------------------------------------------------------------------

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        header = {
            "vocabulary": self.vocabulary,
            "special_ids": self.special_ids,
            "hidden_mult": self.hidden_mult,
            "trunk": json.loads(self.trunk.config.to_json_string(use_diff=False)),
        }
        return self.state_dict(), header

    @classmethod
    def restored(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> DeadEndValueModel:
        check_sizes(header["trunk"], len(tensors))
        model = with_weights(lambda: cls(_trunk(header["trunk"]), header["hidden_mult"]), tensors).eval()
        model(torch.zeros(1, 1, dtype=torch.long))  # a config may be taken and still not work
        model.vocabulary, model.special_ids = header["vocabulary"], header["special_ids"]
        return model


def _trunk(config: dict[str, Any]) -> PreTrainedModel:
    return AutoModel.from_config(AutoConfig.for_model(**config), trust_remote_code=False)


def check_sizes(config: dict[str, Any], tensors: int) -> None:
    """Refuse a config of more layers than there are tensors, or other absurd sizes, before a model is made of it.

    Raises:
        ValueError: the first such number.
    """
    for name, value in config.items():
        most = tensors if DEPTH.fullmatch(name) else 2**31
        if isinstance(value, int) and abs(value) > most:
            raise ValueError(f"the trunk has {name}={value}, at most {most} is possible")


def vocabulary_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of all tokens and their ids."""
    return digest(sorted(tokenizer.get_vocab().items()), 16)


class ValueCache:
    """Q after the newest token of rows that grow, are cut back or change places, read with a key-value cache.

    What was fed is recognized by its content, column by column: common columns stay, the rest is cropped, and rows that
    were put in another order (beams) are put in that order here. Whatever it recognizes, the result is that of reading
    the rows anew.
    """

    def __init__(self, model: DeadEndValueModel) -> None:
        self.model = model
        self.tokens = torch.zeros(0, 0, dtype=torch.long)  # (rows, columns) fed, with their mask
        self.mask = torch.zeros(0, 0, dtype=torch.bool)
        self.cache = DynamicCache()
        self.tokens_processed = 0

    @property
    def columns(self) -> int:
        return self.tokens.shape[1]

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Q (rows, vocab) in float32 after ids (rows, time), padding where the mask is False."""
        kept = self._keep(input_ids, mask)
        padded = None if bool(mask.all()) else mask
        hidden = self.model.hidden(input_ids[:, kept:], padded, self.cache)
        self.tokens, self.mask = input_ids.clone(), mask.clone()
        self.tokens_processed += int(mask[:, kept:].sum())
        return self.model.q_head(hidden[:, -1]).float()

    def common(self, input_ids: Tensor, mask: Tensor) -> int:
        """How many leading columns of every row are in the cache; at most all but the newest."""
        if len(self.tokens) != len(input_ids):
            return 0
        n = min(self.columns, input_ids.shape[1] - 1)
        same = (self.tokens[:, :n] == input_ids[:, :n]) & (self.mask[:, :n] == mask[:, :n])
        return int(same.all(0).long().cumprod(0).sum())

    def rows(self) -> list[ValueCache]:
        """A cache of its own for every row."""
        return [self._row(b) for b in range(len(self.tokens))]

    def _row(self, number: int) -> ValueCache:
        part = ValueCache(self.model)
        part.tokens, part.mask = self.tokens[number : number + 1], self.mask[number : number + 1]
        for index, layer in enumerate(key_layers(self.cache)):
            part.cache.update(layer.keys[number : number + 1], layer.values[number : number + 1], index)
        return part

    def _keep(self, input_ids: Tensor, mask: Tensor) -> int:
        """Bring the cache to the columns it has in common with these rows, and say how many."""
        kept = self.common(input_ids, mask)
        if kept < input_ids.shape[1] - 1 and self._reorder(input_ids, mask):
            kept = input_ids.shape[1] - 1
        if kept == 0:
            self.cache = DynamicCache()
        remove_last(self.cache, [n - kept for n in layer_lengths(self.cache)])
        return kept

    def _reorder(self, input_ids: Tensor, mask: Tensor) -> bool:
        """Put the rows in the order of these, if all their older columns are there in some row."""
        n = input_ids.shape[1] - 1
        if not 0 < n <= self.columns:
            return False
        same = (input_ids[:, None, :n] == self.tokens[None, :, :n]) & (mask[:, None, :n] == self.mask[None, :, :n])
        found = same.all(-1)
        if not bool(found.any(1).all()):
            return False
        self.cache.batch_select_indices(found.long().argmax(1))
        return True
