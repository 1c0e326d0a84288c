"""TiDAR: the model guesses the next tokens itself, in the same forward in which it checks its last guesses.

Paper: TiDAR: Think in Diffusion, Talk in Autoregression, arXiv 2511.08923. A forward gets the next token, which is
certain, the guesses that follow it, and for every number of them that may turn out right a replica: a block of masks
behind just these. The causal rows say which guesses are kept, and the replica that saw exactly those has the next
guesses. No draft model, and no forward that only drafts.

    model.generate(**inputs, custom_generate=tokenry.decode.tidar_generate)

With beta = 1 the text has exactly the distribution of the causal rows. The model should have been trained for this
(`tokenry.train.TiDARTrainer`): the guesses of another one are rejected, which costs time and changes nothing.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.claim import Claim
from ..core.fields import Probability, TokenId, read_none
from .contract import LoopMethod, Plugins
from .speculation.self_draft import SelfDrafting, check_model

__all__ = ["TiDAR"]


class TiDAR(LoopMethod):
    """The model drafts for itself, in the forward in which it checks its last draft."""

    slug: ClassVar[str] = "tidar"
    title: ClassVar[str] = "TiDAR"
    paper: ClassVar[str] = "TiDAR: Think in Diffusion, Talk in Autoregression, arXiv 2511.08923"
    claim: ClassVar[str] = (
        "One model drafts by masked diffusion and checks autoregressively in the same forward pass: more tokens for "
        "each pass, and the text is its own."
    )
    published: ClassVar[Claim] = Claim("8.25", "tokens per forward pass", "TiDAR 8B")
    caution: ClassVar[str] = (
        "guesses are only good where the model was trained for them (zoo/tidar, TiDARTrainer); else decoding is slower"
    )

    block_size: Annotated[int | None, BeforeValidator(read_none)] = Field(
        default=None,
        ge=2,
        le=1024,
        description="tokens checked in a forward, and masks of a replica; none: what the model learned, or 8",
    )
    beta: Probability = Field(default=1.0, description="trust in the causal rows; with 1 the text is exactly theirs")
    mask_token_id: Annotated[TokenId | None, BeforeValidator(read_none)] = Field(
        default=None, description="an id that never occurs in text; none: that of the model"
    )

    def plugins(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Plugins:
        plan = SelfDrafting.of(model, self.mask_token_id, self.block_size, self.beta)
        check_model(model, plan.mask_token_id)
        return Plugins(speculation=plan)
