"""Rectification: no token may be more likely than the risk it brings allows.

Paper: Systematic Rectification of Language Models via Dead-end Analysis, arXiv 2302.14003. A rectifier predicts for
every next token how likely the text that goes on with it ends undesired; the token's probability may not exceed one
minus that risk, and what is taken from it goes to the other tokens. The language model itself is not touched: its
next-token distribution is all that is needed, from logits or from an API.

The published processor lowers logits twice in a row and does not quite meet the caps (`mode="iterate"`). The default
here, `mode="project"`, is the distribution nearest to the model's that does.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessor

from ..core.artifact import ArtifactField
from ..core.errors import InputError
from ..core.fields import Portion, Share
from ..learned.dead_end_values import DeadEndValueModel, ValueCache
from .contract import LoopMethod, Plugins
from .generation.caps import cap_distribution, cap_top_tokens, iterate_caps

__all__ = ["Rectification", "RectifierLogitsProcessor"]


class Rectification(LoopMethod):
    """Cap every next token by the risk that the text it leads to ends undesired."""

    slug: ClassVar[str] = "rectification"
    title: ClassVar[str] = "Rectification"
    paper: ClassVar[str] = (
        "Systematic Rectification of Language Models via Dead-end Analysis, ICLR 2023, arXiv 2302.14003"
    )
    claim: ClassVar[str] = (
        "A small model that knows dead ends, put behind a language model, lowers the rate of undesired texts at little "
        "cost in quality."
    )

    rectifier: ArtifactField[DeadEndValueModel] = Field(
        description="folder of a rectifier, or in Python the rectifier itself; `tokenry train --method rectifier` "
        "makes one"
    )
    eps: Share = Field(0.1, description="taken off every cap; larger is stricter")
    mode: Literal["project", "iterate"] = Field("project", description="caps met exactly, or the published two passes")
    p_min: float = Field(1e-7, ge=1e-30, le=1, description="smallest cap")
    p_max: Portion = Field(1.0, description="largest cap")

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Rectification:
        _check_bounds(self.p_min, self.p_max)
        return self

    def processor(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> RectifierLogitsProcessor:
        """The rectifier as a logits processor for this model; it moves to the model's device."""
        rectifier = self.rectifier.to(model.device)
        rectifier.check(tokenizer)
        vocabulary = model.config.get_text_config().vocab_size
        if rectifier.vocab_size != vocabulary:
            raise InputError(
                f"the rectifier has {rectifier.vocab_size} tokens, the model {vocabulary}; train a rectifier with this "
                "model's vocabulary"
            )
        return RectifierLogitsProcessor(rectifier, self.eps, self.mode, self.p_min, self.p_max)

    def plugins(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Plugins:
        return Plugins(final_processors=[self.processor(model, tokenizer)])


class RectifierLogitsProcessor(LogitsProcessor):
    """Caps every next token at 1 + Q - eps, Q being the rectifier's (arXiv 2302.14003).

    It must act last: temperature or top-p after it would lift capped tokens again. In the decode loop give it as a cap
    (`final_processors=[...]`); in plain `generate` put the warpers before it into `logits_processor` yourself. The
    rectifier reads along with a cache of its own, which follows rewinds and beams.

    Args:
        rectifier: in eval mode, made for the same vocabulary.
        eps: taken off every cap; larger is stricter, 0 is the pure cap.
        mode: "project" meets the caps exactly; "iterate" is the published approximation.
        p_min, p_max: bounds of a cap.
        attention_mask: (batch, prompt) of the prompts of the next plain `generate`, where they are padded with a token
            that can also be a real one. The decode loop says it itself.

    Attributes:
        infeasible: rows (batch,) of the newest call whose caps sum to less than 1: next to dead ends.

    Raises:
        InputError: a number out of range, a rectifier in training mode; when called, another vocabulary size, NaN.
    """

    def __init__(
        self,
        rectifier: DeadEndValueModel,
        eps: float = 0.1,
        mode: Literal["project", "iterate"] = "project",
        p_min: float = 1e-7,
        p_max: float = 1.0,
        attention_mask: Tensor | None = None,
    ) -> None:
        if not 0 <= eps < 1:
            raise InputError(f"eps={eps} is not allowed; give a number in [0, 1), 0 for the pure cap")
        if mode not in ("project", "iterate"):
            raise InputError(f"mode={mode!r} is unknown; use 'project' or 'iterate'")
        _check_bounds(p_min, p_max)
        self.rectifier, self.eps, self.mode, self.p_min, self.p_max = rectifier, eps, mode, p_min, p_max
        self.given_mask = attention_mask
        self.infeasible: Tensor | None = None
        self._restart(attention_mask)
        self._check_mode()

    def begin(self, prompt_length: int, attention_mask: Tensor | None = None) -> None:
        """A generation of the decode loop starts, with prompts of this length and mask (batch, prompt_length)."""
        self._restart(self.given_mask if attention_mask is None else attention_mask)
        self.looped = True

    def end(self) -> None:
        """The generation that `begin` announced is over."""
        self._restart(self.given_mask)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (batch, vocab) under the caps: log-probabilities, or `scores` itself where no cap binds."""
        cap = self.caps(input_ids).to(scores.device)
        if cap.shape[-1] != scores.shape[-1]:
            raise InputError(
                f"the rectifier has {cap.shape[-1]} tokens, the model {scores.shape[-1]}; train a rectifier with this "
                "model's vocabulary"
            )
        if self.mode == "iterate":
            return iterate_caps(scores, cap)
        capped, self.infeasible = cap_distribution(scores, cap)
        return capped

    def top(self, input_ids: Tensor, token_ids: Tensor, logp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For an API that lists its k most likely next tokens: see `cap_top_tokens`.

        Args:
            input_ids: the text so far (batch, time).
            token_ids, logp: the listed tokens and their log-probabilities (batch, k).
        """
        return cap_top_tokens(logp, self.caps(input_ids).to(logp.device).gather(-1, token_ids))

    def caps(self, input_ids: Tensor) -> Tensor:
        """The largest probability of every next token, (batch, vocab), float32."""
        self._check_mode()
        q = self._values(input_ids.to(self.rectifier.device))
        if bool(q.isnan().any()):
            raise InputError("the rectifier gives NaN for this text; train it again with a lower learning rate")
        return (1 + q - self.eps).clamp(self.p_min, self.p_max)

    # --- reading along -------------------------------------------------------------------------------------

    def _restart(self, prompt_mask: Tensor | None) -> None:
        self.looped, self.prompt_mask, self.batch = False, prompt_mask, None
        self.together, self.alone = ValueCache(self.rectifier), None  # all rows in step, or each row for itself

    def _values(self, ids: Tensor) -> Tensor:
        """Q (batch, vocab). The decode loop may ask for one row of the batch, shorter or longer than the others."""
        if not self.looped:
            return self.together(ids, self._mask(ids))
        self.batch = self.batch or len(ids)
        if len(ids) == self.batch:
            mask = self._mask(ids)
            if self.alone is None:
                return self.together(ids, mask)
            rows = range(self.batch)
            return torch.cat([self.alone[b](ids[b : b + 1], mask[b : b + 1]) for b in rows])
        if self.alone is None:
            self.alone, self.together = self.together.rows(), ValueCache(self.rectifier)
        return self._row_values(ids)

    def _row_values(self, ids: Tensor) -> Tensor:
        """Q (1, vocab) of one row, which is told from the others by what it has in common with what they read."""
        masks = [self._mask(ids, b) for b in range(self.batch)]
        common = [(cache.common(ids, mask), -cache.columns) for cache, mask in zip(self.alone, masks)]
        b = max(range(self.batch), key=common.__getitem__)
        return self.alone[b](ids, masks[b])

    def _mask(self, ids: Tensor, row: int | None = None) -> Tensor:
        """Which ids (batch, time) are no padding, by the mask of the prompts or else by a leading run of pad tokens."""
        if self.prompt_mask is None:
            return self._without_leading_pads(ids)
        known = self.prompt_mask.bool().to(ids.device)
        known = known if row is None else known[row : row + 1]
        if len(ids) % len(known) or known.shape[1] > ids.shape[1]:
            raise InputError(
                f"attention_mask has the shape {tuple(known.shape)}, the ids {tuple(ids.shape)}; make a new processor "
                "for other prompts"
            )
        known = known.repeat_interleave(len(ids) // len(known), 0)  # beams and several samples of a prompt
        return torch.nn.functional.pad(known, (0, ids.shape[1] - known.shape[1]), value=True)

    def _without_leading_pads(self, ids: Tensor) -> Tensor:
        special = self.rectifier.special_ids
        pad = special.get("pad")
        if not special and len(ids) > 1:
            raise InputError(
                f"the rectifier knows no tokenizer, so padding of {len(ids)} rows cannot be told; bind it to the "
                "tokenizer, or pass attention_mask"
            )
        if pad is None:
            return torch.ones_like(ids, dtype=torch.bool)
        leading = (ids == pad).long().cumprod(1).bool()
        if bool(leading.any()) and pad in (special["eos"], special["bos"]):
            raise InputError(
                f"a prompt begins with token {pad}, which is padding and a real token at once; pass attention_mask"
            )
        return ~leading

    def _check_mode(self) -> None:
        if self.rectifier.training:
            raise InputError("the rectifier is in training mode, its dropout would make caps random; call eval() first")


def _check_bounds(p_min: float, p_max: float) -> None:
    if not 0 < p_min <= p_max <= 1:
        raise InputError(f"p_min={p_min} and p_max={p_max} are not allowed; give 0 < p_min <= p_max <= 1")
