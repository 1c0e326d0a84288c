"""Optimal multi-draft speculative decoding: greedy drafts, with the verifier that reaches their ceiling.

Paper: Towards Optimal Multi-draft Speculative Decoding, arXiv 2502.18779. The ceilings themselves are in
`tokenry.decode.speculation.acceptance`, the verifiers in `tokenry.decode.speculation.verifiers`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..core.fields import Drafts
from .speculation.method import DraftingMethod

__all__ = ["OptimalMDSD"]


class OptimalMDSD(DraftingMethod):
    """Several drafts per position: the most probable ones and a random one, accepted as often as can be."""

    slug: ClassVar[str] = "optimal-mdsd"
    title: ClassVar[str] = "Optimal multi-draft speculative decoding"
    paper: ClassVar[str] = "Towards Optimal Multi-draft Speculative Decoding, arXiv 2502.18779"
    claim: ClassVar[str] = (
        "Drafts without replacement can be accepted more often than drafts with it; K-SEQ and recursive rejection stay "
        "below what is possible, and greedy drafts have a verifier that does not."
    )

    verifier: Literal["single", "naive", "rrs", "rrs-without", "kseq", "greedy"] = Field(
        default="greedy", description="how the token is selected among the drafts"
    )
    num_drafts: Drafts = Field(default=4, description="drafts per position")
