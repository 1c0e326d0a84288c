"""Hybrid morphological tokenizer: roots and suffixes of a dictionary first, learned subwords for the rest.

Paper: Tokens with Meaning: A Hybrid Tokenization Approach for NLP, arXiv 2508.14292.
A word is cut greedily: at each place the longest root, else the longest suffix, else the longest subword, or, by the
rule of the package's later versions, the entry of the highest score, which looks one suffix ahead. Forms of one
morpheme (kitap and kitab, -lar and -ler) share an id, and decoding chooses the form that vowels and consonants around
it ask for. Unlike the published code this one loses nothing: what decoding would not give back keeps an id of its own,
and what no entry matches is bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerFast

from ..core.claim import Claim
from ..core.errors import InputError
from .contract import TokenizeMethod
from .morphology.dictionary import MorphDictionary, Morpheme
from .morphology.pipeline import EOS, PAD, backend, entries
from .morphology.subwords import choose_roots, learn_subwords, word_counts
from .morphology.tokenizer import MorphTokenizer

__all__ = ["Morphological", "tokenizer_of"]


class Morphological(TokenizeMethod):
    """A tokenizer of roots, suffixes and subwords: `Morphological(dictionary="turkish").train(texts)`."""

    slug: ClassVar[str] = "morphological"
    title: ClassVar[str] = "Hybrid morphological tokenizer"
    paper: ClassVar[str] = "Tokens with Meaning: A Hybrid Tokenization Approach for NLP, arXiv 2508.14292"
    claim: ClassVar[str] = (
        "A tokenizer that knows roots and suffixes cuts words at the borders of morphemes far more often than BPE, and "
        "pays for it with more tokens."
    )
    published: ClassVar[Claim] = Claim(
        "90.29", "% of distinct tokens are words or morphemes (gemma-2: 40.96)", "32k vocabulary, TR-MMLU, Turkish"
    )

    dictionary: str = Field(
        default="turkish", description="turkish, english (a small example), or a JSON file with a dictionary"
    )
    vocab_size: int = Field(
        default=32768,
        ge=300,
        le=2**20,
        description="entries in all: marks, morphemes, their single forms, bytes, subwords",
    )
    n_roots: int = Field(
        default=16000, ge=0, le=2**20, description="roots that are kept, those that occur most in the text first"
    )
    rule: Literal["cascade", "score"] = Field(
        default="cascade",
        description="the longest root, else suffix, else subword; or the entry that ends the word or has a suffix "
        "behind it",
    )
    share_ids: bool = Field(
        default=True,
        description="forms of one morpheme share an id; false gives a plain tokenizer that every tool reads",
    )
    guard: bool = Field(
        default=True, description="keep a form's own id where decoding would choose another; false is the paper's code"
    )

    @model_validator(mode="after")
    def _fits(self) -> Morphological:
        if not self.share_ids and not self.guard:
            raise ValueError(
                "guard=False has no effect with share_ids=False, where each form has its own id; leave it out"
            )
        if not self.share_ids and self.rule == "score":
            raise ValueError("share_ids=False gives a plain tokenizer, which cannot look ahead; leave out rule=score")
        return self

    def train(self, texts: Iterable[str]) -> PreTrainedTokenizerFast:
        """Rank the roots by the documents, and learn subwords from what roots and suffixes leave of them.

        Raises:
            InputError: no text at all, a document that is not text, a dictionary that cannot be used, or one that
                does not fit into the vocabulary.
        """
        dictionary = MorphDictionary.load(self.dictionary)
        counts = word_counts(texts)
        dictionary = choose_roots(dictionary, counts, self.n_roots, self.rule)
        room = self.vocab_size - len(entries(dictionary, self.rule))
        if room < 0:
            raise InputError(
                f"vocab_size={self.vocab_size} has no room for the dictionary, which takes {self.vocab_size - room} "
                "entries; give at least that many, or fewer n_roots"
            )
        learned = [Morpheme("subword", (string,)) for string in learn_subwords(dictionary, counts, room, self.rule)]
        letters = [m for m in dictionary.morphemes if m.kind == "letter"]
        others = [m for m in dictionary.morphemes if m.kind != "letter"]
        dictionary = dictionary.with_morphemes([*others, *learned, *letters])
        return tokenizer_of(dictionary, self.share_ids, self.guard, self.rule)


def tokenizer_of(
    dictionary: MorphDictionary, share_ids: bool = True, guard: bool = True, rule: str = "cascade"
) -> PreTrainedTokenizerFast:
    """The tokenizer of a dictionary as it stands, without training."""
    table = entries(dictionary, rule)
    pipeline = backend(dictionary, table)
    if not share_ids:
        return PreTrainedTokenizerFast(
            tokenizer_object=pipeline, pad_token=PAD, eos_token=EOS, clean_up_tokenization_spaces=False
        )
    morphology = {
        "guard": guard,
        "rule": rule,
        "case": dict(dictionary.case),
        "contexts": {name: dict(sides) for name, sides in dictionary.contexts.items()},
        "rules": {name: [list(form) for form in forms] for name, forms in dictionary.rules.items()},
        "entries": [[at, e.token, e.kind, list(e.forms), e.rule, e.shared] for at, e in sorted(table.items())],
    }
    return MorphTokenizer(tokenizer_object=pipeline, morphology=morphology)
