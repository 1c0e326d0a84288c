"""What methods that draft have in common: a drafter, a verifier, and the size of the tree."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.fields import Drafts, Layers, Multiple, read_none
from ...core.method import Local
from ..contract import LoopMethod, Plugins
from .drafters import check_same_tokens, make_drafter
from .loop import Speculation, make_verifier

__all__ = ["DraftingMethod"]


class DraftingMethod(LoopMethod):
    """A method that drafts several tokens per step and verifies them in one forward of the model."""

    drafter: Annotated[str, Local()] = Field(
        default="prompt-lookup",
        min_length=1,
        description="prompt-lookup, ngram, early-exit, or a model such as zoo/drafter",
    )
    verifier: Literal["single", "naive", "rrs", "rrs-without", "kseq", "greedy"] = Field(
        default="kseq", description="how the token is selected among the drafts"
    )
    num_drafts: Drafts = Field(default=8, description="drafts per position")
    draft_length: Drafts = Field(default=4, description="tokens that are drafted ahead")
    gamma: Multiple | Literal["optimal"] = Field(
        default="optimal", description="division factor of kseq, moved into what is valid at a position, or optimal"
    )
    exit_layers: Annotated[Layers | None, BeforeValidator(read_none)] = Field(
        default=None, description="layers of early-exit; none: two thirds"
    )

    def plugins(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Plugins:
        drafter = make_drafter(self.drafter, model, self.exit_layers)
        if self.drafter not in ("prompt-lookup", "ngram", "early-exit"):
            check_same_tokens(self.drafter, model, tokenizer)
        plan = Speculation(drafter, make_verifier(self.verifier, self.gamma), self.num_drafts, self.draft_length)
        return Plugins(speculation=plan)
