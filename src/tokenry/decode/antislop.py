"""Antislop: ban phrases, regular expressions and n-grams without banning their words.

Paper: Antislop: A Comprehensive Framework for Identifying and Eliminating Repetitive Patterns in Language Models,
arXiv 2510.15061. Generation runs normally; when a banned pattern is complete, the loop goes back to the token it
starts with, lowers that token by 10^(-10 s) (s = ban strength; 1 bans it), and samples again from there.

The result is not the model's distribution conditioned on having no pattern: a ban is local to the position and is
forgotten when a rewind goes further back.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from ..core.claim import Claim
from ..core.fields import Count, Probability
from ..core.method import Lines
from ..data.phrases import Phrases
from .bans.ngrams import NGramBan
from .bans.patterns import RegexBan
from .bans.phrases import PhraseBan
from .contract import MonitorMethod

__all__ = ["Antislop"]


class Antislop(MonitorMethod):
    """The sampler as one method: phrases, regular expressions and n-grams with one strength."""

    slug: ClassVar[str] = "antislop"
    title: ClassVar[str] = "Antislop"
    paper: ClassVar[str] = (
        "Antislop: A Comprehensive Framework for Identifying and Eliminating Repetitive Patterns "
        "in Language Models, arXiv 2510.15061"
    )
    claim: ClassVar[str] = (
        "Banned phrases disappear completely while quality stays; banning their first tokens instead ruins the text."
    )
    published: ClassVar[Claim] = Claim("8,000+", "patterns suppressed, quality kept", "creative writing")

    phrases: Phrases = Field(
        default=(), description="phrases to ban, or a text file with one a line; builtin:en for a list of the package"
    )
    regexes: Lines = Field(default=(), description="regular expressions to ban, or a file with one a line")
    ngrams: Lines = Field(
        default=(), description="sequences of words to ban, stop words may stand between, or a file with one a line"
    )
    strength: Probability = Field(default=1.0, description="probability factor 10^(-10 s); 1 bans, 0 does nothing")
    prefer: Literal["longest", "shortest"] = Field(default="longest", description="which phrase counts at one start")
    start_tokens: bool = Field(
        default=False,
        description="lower every token that a phrase can start with, not only the rejected one (local sampler)",
    )
    max_span: Count | None = Field(default=None, description="longest regex match in characters; needed for streaming")
    force_backtrack: bool = Field(
        default=False, description="drop temperature, min-p, top-p and top-k rather than give up"
    )
    invert_probs: bool = Field(default=False, description="favor unlikely replacements")
    max_retries: Count = Field(default=100, description="repairs at one position before it is given up")

    @model_validator(mode="after")
    def _has_valid_patterns(self) -> Antislop:
        self.monitors()  # builds and thereby checks every pattern
        return self

    def monitors(self, tokenizer: PreTrainedTokenizerBase | None = None) -> list[PhraseBan | RegexBan | NGramBan]:
        """The monitors these parameters stand for; none at strength 0. They need no tokenizer."""
        if self.strength == 0:
            return []
        repair: dict[str, Any] = {
            "force_backtrack": self.force_backtrack,
            "invert_probs": self.invert_probs,
            "max_retries": self.max_retries,
        }
        made: list[PhraseBan | RegexBan | NGramBan] = []
        if self.phrases:
            made.append(PhraseBan(self.phrases, self.strength, self.prefer, self.start_tokens, **repair))
        if self.regexes:
            made.append(RegexBan(self.regexes, self.max_span, self.strength, **repair))
        if self.ngrams:
            made.append(NGramBan(self.ngrams, self.strength, **repair))
        return made
