"""What a decode method is given and answers, as JSON."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, Field

from ...core.fields import Portion, Probability, Seed, Temperature, Times, Tokens
from ...core.schemas import Exchanged

__all__ = ["DecodeAnswer", "DecodeRequest"]


class DecodeRequest(Exchanged):
    """A prompt, and how it is continued."""

    prompt: str = Field(min_length=1)
    max_new_tokens: Tokens = 256
    greedy: bool = Field(False, description="take the most probable token instead of sampling")
    temperature: Temperature = 1.0
    min_p: Probability = 0.05
    top_p: Portion = 1.0
    top_k: Times = Field(0, description="0: no limit")
    seed: Seed = 0
    raw: bool = Field(False, description="continue the prompt itself, without the chat template")


class DecodeAnswer(Exchanged):
    """What was written. A method adds what it has counted."""

    model_config = ConfigDict(extra="allow")

    text: str
    ids: list[int] = Field(description="the new tokens")
    events: list[dict[str, Any]] = Field(description="repairs of the text, in their order")
    forward_calls: int = Field(ge=0)
    tokens_processed: int = Field(ge=0, description="tokens that went through the model")
