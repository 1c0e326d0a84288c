"""SpecTr: several drafts per position, and K-SEQ, a verifier that keeps the target's distribution.

Paper: SpecTr: Fast Speculative Decoding via Optimal Transport, arXiv 2310.15141. A drafter scores continuations, a
verifier selects among what was drawn from these scores; any two go together (`decode/speculation`).

    model.generate(**inputs, custom_generate=tokenry.decode.speculative, drafter="prompt-lookup", num_drafts=1)
"""

from __future__ import annotations

from typing import ClassVar

from ..core.claim import Claim
from .speculation.method import DraftingMethod

__all__ = ["Spectr"]


class Spectr(DraftingMethod):
    """Several drafts per position, and a verifier that keeps the target's distribution."""

    slug: ClassVar[str] = "spectr"
    title: ClassVar[str] = "SpecTr"
    paper: ClassVar[str] = "SpecTr: Fast Speculative Decoding via Optimal Transport, arXiv 2310.15141"
    claim: ClassVar[str] = (
        "The model writes the same text with fewer forward passes, and fewer still with several drafts per position "
        "than with one."
    )
    published: ClassVar[Claim] = Claim("2.13", "times faster than token by token", "PaLM-2-Bison with Gecko, LM1B")
