"""The decode loop of a model that drafts for itself: it denoises the next block while it checks the last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList

from ...core.errors import InputError
from ...models.masks import as_attention_mask, check_full_attention, check_mask, check_mask_token, draft_mask
from ..api import loop
from ..generation.engine import TransformersEngine
from ..generation.job import Job
from ..generation.loop import DecodeLoop
from ..generation.options import hands_on_to
from ..generation.output import DecodeOutput
from ..generation.plugins import NO_PLUGINS, Plugins
from ..generation.sequence import SequenceState
from .loop import SpeculativeLoop, SpeculativeStats
from .tree import ROOT, DraftTree
from .verifiers import VERIFIERS, Verifier

__all__ = ["SelfDrafting", "TiDARLoop", "tidar_generate"]


BLOCK = 8  # masks of a replica, where neither the caller nor the model says
# Models that passed `check_mask`, and by which kernel.
_OBEYED: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()


@dataclass(frozen=True)
class SelfDrafting:
    """A model that drafts for itself: what `loop` takes as `speculation`.

    Args:
        mask_token_id: the token that stands for a guess; it is never part of a text.
        block_size: the certain token and the guesses that are checked in a forward, and the masks of a replica.
        beta: trust in the causal rows; the rest goes to what the masks say of the same position.
    """

    mask_token_id: int
    block_size: int = BLOCK
    beta: float = 1.0
    drafter: ClassVar[None] = None  # nobody else drafts
    num_drafts: ClassVar[int] = 1
    verifier: ClassVar[Verifier] = VERIFIERS["single"]

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise InputError(f"block_size={self.block_size} is not allowed; give a number of tokens >= 2")
        if not 0 <= self.beta <= 1:
            raise InputError(f"beta={self.beta} is not allowed; give a number in [0, 1]")

    @classmethod
    def of(
        cls, model: PreTrainedModel, mask_token_id: int | None = None, block_size: int | None = None, beta: float = 1.0
    ) -> SelfDrafting:
        """With what the model's config remembers of its training, where nothing else is given."""
        mask = getattr(model.config, "mask_token_id", None) if mask_token_id is None else mask_token_id
        size = getattr(model.config, "tidar_block_size", BLOCK) if block_size is None else block_size
        if mask is None:
            raise InputError("the model has no mask token; give mask_token_id, an id that never occurs in text")
        return cls(mask, size, beta)

    def loop(
        self,
        engine: TransformersEngine,
        job: Job,
        tokenizer: PreTrainedTokenizerBase | None = None,
        plugins: Plugins = NO_PLUGINS,
    ) -> TiDARLoop:
        """The decode loop that drafts."""
        return TiDARLoop(self, engine, job, tokenizer, plugins)


class TiDARLoop(SpeculativeLoop):
    """The decode loop for one row, in which a forward checks a draft and makes the next one.

    Raises:
        InputError: a model that cannot follow the mask, a mask token that is not one, or several or padded prompts.
    """

    speculation: SelfDrafting
    engine: TransformersEngine  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        speculation: SelfDrafting,
        engine: TransformersEngine,
        job: Job,
        tokenizer: PreTrainedTokenizerBase | None = None,
        plugins: Plugins = NO_PLUGINS,
    ) -> None:
        check_model(engine.model, speculation.mask_token_id)
        _check_prompt(job, speculation.mask_token_id)
        # A Speculation in all but the drafter, which nobody asks here.
        super().__init__(cast(Any, speculation), engine, job, tokenizer, plugins)
        self.independent = True  # a chain: every depth has one draft, whatever it is worth
        size, self.most = speculation.block_size, self.prompt_length + job.max_new_tokens
        slots = torch.arange(size, device=self.device)
        # Built once: a step looks at the last columns of the mask, and adds its length to the positions.
        self.sees = as_attention_mask(engine.model, draft_mask(self.most, size))
        self.places = torch.cat([slots, (slots[:, None] + slots + 1).flatten()])[None]
        self.tree: DraftTree | None = None

    def _prefill(self) -> None:
        self._read(self.job.input_ids)
        self.stats = SpeculativeStats()

    def _advance(self) -> None:
        if self.tree is None:  # a monitor has taken back or put in what no replica has seen
            self.stats.target_calls += 1
            self._read(torch.tensor([self.rows[0].ids[self.rows[0].fed :]], device=self.device))
        else:
            self._speculate(self.tree)

    def _read(self, new: Tensor) -> None:
        """Feed tokens (1, k) with a replica behind them: the next token, and the guesses after it."""
        row, size, count = self.rows[0], self.speculation.block_size, new.shape[1]
        past, width = self.engine.columns, count + size
        sees = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        sees[count:, count:] = True
        sees = torch.cat([sees.new_ones(width, past), sees], 1)[None, None]
        places = torch.arange(past, past + width, device=self.device)[None]
        logits = self._feed(new[0].tolist(), as_attention_mask(self.engine.model, sees), places, size + 1)
        self.engine.rollback(0, size)
        row.fed = fed = len(row.ids)
        steps, _ = self._walk(row, DraftTree(), self._trusted(logits[:1], logits[1:2]))
        self._commit(row, steps)
        self._guess(row, logits[1:] if row.fed == fed else None)

    def _speculate(self, tree: DraftTree) -> None:
        """Feed the draft with all its replicas, keep what passes, and take the guesses of the replica that saw it."""
        row, size = self.rows[0], self.speculation.block_size
        start, past, width = row.fed, self.engine.columns, self.places.shape[1]
        sees = self.sees[..., self.most - past :]
        logits = self._feed([row.ids[-1], *tree.tokens], sees, self.places + past, width)
        replicas = logits[size:].view(size, size, -1)
        steps, nodes = self._walk(row, tree, self._trusted(logits[:size], replicas[:, 0]))
        self.engine.rollback(0, width - 1 - len(nodes))
        row.fed = len(row.ids) + len(nodes)
        self.stats.target_calls += 1
        self.stats.drafted += len(tree)
        self._commit(row, steps)
        self._guess(row, replicas[row.fed - start - 1] if row.fed > start else None)

    def _feed(self, tokens: list[int], sees: Tensor, places: Tensor, count: int) -> Tensor:
        """Feed these tokens and masks up to the width of `sees`; logits (count, vocabulary) of the last rows."""
        masks = [self.speculation.mask_token_id] * (places.shape[1] - len(tokens))
        logits = self.engine.forward_block(torch.tensor([tokens + masks], device=self.device), sees, places, count)
        logits[:, self.speculation.mask_token_id] = -torch.inf
        return logits

    def _trusted(self, causal: Tensor, masked: Tensor) -> Tensor:
        """What decides (rows, vocabulary): the causal rows, mixed with what masks say of the same positions."""
        beta = self.speculation.beta
        if beta == 1:
            return causal
        mixed = beta * causal + (1 - beta) * masked
        mixed[:, self.speculation.mask_token_id] = -torch.inf  # where 0 * inf was no number
        return mixed

    def _guess(self, row: SequenceState, masked: Tensor | None) -> None:
        """Draft behind the last token of the row, from a replica's logits (block, vocabulary) that begin at it."""
        self.active = set() if row.finished else {0}
        self.tree = None
        if masked is None or len(row.ids) - row.fed != 1:
            return
        self.tree, nodes = DraftTree(), [ROOT]
        for scores in self._scores(row, masked)[: self._room(row) - 1]:
            nodes = self._branch(row, self.tree, nodes, scores[None])

    def _scores(self, row: SequenceState, masked: Tensor) -> Tensor:
        """The scores (block - 1, vocabulary) that guesses are drawn from: those at the place of the last token are not
        needed any more."""
        return masked[1:]


def _check_prompt(job: Job, mask_token_id: int) -> None:
    """Refuse several prompts, a padded one, and one with the mask token in it."""
    ids, mask = job.input_ids, job.attention_mask
    if len(ids) != 1:
        raise InputError(f"{len(ids)} prompts at a time are too many for tidar; give one (--batch-size 1)")
    if mask is not None and not bool(mask.all()):
        raise InputError("the prompt is padded; give a single prompt without padding")
    if (ids == mask_token_id).any():
        raise InputError(f"the prompt contains the mask token {mask_token_id}; it stands for guesses, remove it")


def check_model(model: PreTrainedModel, mask_token_id: int) -> None:
    """Refuse a model that has no place for guesses; the forwards that this needs are done once for a model."""
    check_mask_token(model, mask_token_id)
    check_full_attention(model)
    if getattr(model.config.get_text_config(), "rope_parameters", None) is None:
        name = type(model).__name__
        raise InputError(f"{name} has no rotary positions, and masks share those of other tokens; use one that has")
    kernel = model.config._attn_implementation
    if _OBEYED.get(model) != kernel:
        check_mask(model, draft_mask(0, 2))
        _OBEYED[model] = kernel


# --- how it is called ----------------------------------------------------------------------------------------------


@hands_on_to(loop, "speculation")
def tidar_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Sequence[Any],
    generation_config: GenerationConfig,
    block_size: int | None = None,
    beta: float = 1.0,
    mask_token_id: int | None = None,
    **options: Any,
) -> DecodeOutput | DecodeLoop | Tensor:
    """TiDAR as a `custom_generate` callable; the arguments are those of `TiDAR` and of the decode loop.

    Takes one prompt. With `return_dict_in_generate=True` returns a `SpeculativeOutput`.
    """
    return loop(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        speculation=SelfDrafting.of(model, mask_token_id, block_size, beta),
        **options,
    )
