"""Masked-diffusion sampling as a decode method: the rules that the other methods for such models are measured against.

Papers: LLaDA, arXiv 2502.09992; Dream 7B, arXiv 2508.15487; Fast-dLLM, arXiv 2505.22618.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from ..core.claim import Claim
from ..core.fields import Portion, Positive, Probability, Temperature, Tokens, Weight, check, read_none
from .denoising.contract import DiffusionMethod, DiffusionParts
from .denoising.transforms import Guidance
from .denoising.unmask import Confidence, Factor, FixedCount, RandomUnmask, RunAnchors

__all__ = ["MaskedDiffusion"]


class MaskedDiffusion(DiffusionMethod):
    """A masked-diffusion model, decoded by one of the published rules."""

    slug: ClassVar[str] = "masked-diffusion"
    title: ClassVar[str] = "Masked diffusion"
    paper: ClassVar[str] = "LLaDA, arXiv 2502.09992; Dream 7B, arXiv 2508.15487; Fast-dLLM, arXiv 2505.22618"
    claim: ClassVar[str] = (
        "A masked-diffusion model writes as well in a few forward passes as with one for every token, if only what it "
        "is sure of is committed together."
    )
    published: ClassVar[Claim] = Claim(
        "8.1",
        "times faster with threshold and cache (79.3 to 78.5 % right)",
        "Fast-dLLM, LLaDA-8B-Instruct, GSM8K, length 256",
    )

    policy: Literal["fixed", "threshold", "factor", "runs", "chance"] = Field(
        default="threshold", description="what is committed in a step"
    )
    steps: Annotated[Tokens | None, BeforeValidator(read_none)] = Field(
        default=None, description="forward passes with fixed and chance; none: one for every token"
    )
    confidence: Confidence = Field(default="probability", description="what the best tokens are, with fixed")
    position_temperature: float = Field(
        default=0.0, ge=0, le=10_000, description="above 0 the positions are drawn, with fixed"
    )
    threshold: Portion = Field(default=0.9, description="least probability, with threshold and runs")
    low: Probability = Field(default=0.4, description="least probability of the best of a run of masks, with runs")
    factor: Positive = Field(default=1.0, description="the larger, the more at once, with factor")
    guidance: Weight = Field(default=0.0, description="classifier-free guidance; doubles the forwards")

    @field_validator("position_temperature")
    @classmethod
    def _draws(cls, temperature: float) -> float:
        if temperature:
            check("position_temperature", temperature, Temperature)
        return temperature

    def parts(self, max_new_tokens: int) -> DiffusionParts:
        guidance = (Guidance(self.guidance),) if self.guidance else ()
        if self.policy == "threshold":
            return DiffusionParts(threshold=self.threshold, transforms=guidance)
        unmask = {
            "fixed": lambda: FixedCount(self.steps, self.confidence, self.position_temperature),
            "factor": lambda: Factor(self.factor),
            "runs": lambda: RunAnchors(self.threshold, self.low),
            "chance": lambda: RandomUnmask(self.steps or max_new_tokens),
        }[self.policy]
        return DiffusionParts(unmask(), transforms=guidance)
