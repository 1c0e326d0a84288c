"""DAEDAL: masked-diffusion decoding that finds the length of the answer itself.

Paper: Beyond Fixed: Training-Free Variable-Length Denoising for Diffusion Large Language Models, arXiv 2508.00819. The
window starts short. First it grows, all masks, until the model is sure that its end is end-of-text. Then it is filled,
and a mask of which the model is very unsure gives way to several, as long as the end is not certain.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from ..core.errors import InputError
from ..core.fields import Portion, Probability, Share, Tokens
from .denoising.contract import DiffusionMethod, DiffusionParts
from .denoising.growth import DaedalLength, Tail

__all__ = ["Daedal"]


class Daedal(DiffusionMethod):
    """Threshold decoding of a masked-diffusion model in windows that grow as they must."""

    slug: ClassVar[str] = "daedal"
    title: ClassVar[str] = "DAEDAL"
    paper: ClassVar[str] = (
        "Beyond Fixed: Training-Free Variable-Length Denoising for Diffusion Large Language Models, arXiv 2508.00819"
    )
    claim: ClassVar[str] = (
        "A masked-diffusion model that starts with a short window and lets it grow answers as well as with the best "
        "fixed length of each task, and wastes fewer tokens."
    )

    threshold_option: ClassVar[str] = "high_conf_threshold"
    policy: ClassVar[type[DaedalLength]] = DaedalLength

    initial_gen_length: Tokens = Field(default=64, description="width of the window at first")
    max_gen_length: Tokens = Field(default=2048, description="widest window; max_new_tokens limits it, too")
    expansion_factor: int = Field(default=8, ge=2, le=4096, description="masks that come at a time")
    high_conf_threshold: Portion = Field(default=0.9, description="tokens at least this probable are committed")
    low_conf_threshold: Share = Field(
        default=0.1, description="a mask whose best token is less probable may give way to several; 0: never"
    )
    eos_confidence_threshold: Probability = Field(
        default=0.5, description="the window grows at first while its end is less certain; 0: not at all"
    )
    expand_eos_confidence_threshold: Probability = Field(
        default=0.9, description="masks are inserted while its end is less certain"
    )
    eos_check_tokens: Tokens = Field(default=32, description="end-of-text tokens that make a certain end")
    tail: Tail = Field(
        default="eos",
        description="what comes after a window that has grown, half of eos_check_tokens: eos, mask, or none",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Daedal:
        if self.max_gen_length < self.initial_gen_length:
            raise InputError(
                f"max_gen_length={self.max_gen_length} is less than initial_gen_length={self.initial_gen_length}; "
                "change one of them"
            )
        if self.low_conf_threshold >= self.high_conf_threshold:
            raise InputError(
                f"low_conf_threshold={self.low_conf_threshold} is not below "
                f"high_conf_threshold={self.high_conf_threshold}; change one of them"
            )
        return self

    def parts(self, max_new_tokens: int) -> DiffusionParts:
        maximum = min(self.max_gen_length, max_new_tokens)
        if maximum < self.initial_gen_length:
            raise InputError(
                f"max_new_tokens={max_new_tokens} is less than initial_gen_length={self.initial_gen_length}; raise the "
                "first or lower the second"
            )
        length = self.policy(
            maximum,
            self.expansion_factor,
            self.low_conf_threshold,
            self.eos_confidence_threshold,
            self.expand_eos_confidence_threshold,
            self.eos_check_tokens,
            self.tail,
        )
        return DiffusionParts(threshold=self.high_conf_threshold, length=length, gen_length=self.initial_gen_length)
