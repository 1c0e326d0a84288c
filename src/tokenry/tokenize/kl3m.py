"""KL3M: byte-level BPE for a domain, with custom tokens, or for text correction, with tokens of bounded length.

Paper: KL3M Tokenizers: A Family of Domain-Specific and Character-Level Tokenizers for Legal, Financial, and
Preprocessing Applications, arXiv 2503.17247.
Unlike the published files these tokenizers lose no byte, never cut a word at a custom token inside it, and are padded
to the next power of two, not past it, by short runs of whitespace and then by reserved tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Count
from ..text.token_text import check_encodable
from .contract import TokenizeMethod
from .text.kl3m_tokens import GROUPS, custom_tokens, read_custom_tokens

__all__ = ["KL3M", "SPECIAL_TOKENS"]


class KL3M(TokenizeMethod):
    """Train a tokenizer on the text of a domain: `KL3M(vocab_size=8192).train(texts)`."""

    slug: ClassVar[str] = "kl3m"
    title: ClassVar[str] = "KL3M tokenizers"
    paper: ClassVar[str] = (
        "KL3M Tokenizers: A Family of Domain-Specific and Character-Level Tokenizers for Legal, Financial, and "
        "Preprocessing Applications, arXiv 2503.17247"
    )
    claim: ClassVar[str] = (
        "A vocabulary learned from a domain needs fewer tokens for its text than a general one of equal size, and "
        "short tokens cut wrong and right spellings at the same places."
    )
    published: ClassVar[Claim] = Claim(
        "0.2417", "tokens per character (gpt-4o: 0.2636)", "128k-cased, mean of five kinds of text"
    )

    kind: Literal["domain", "char"] = Field(
        default="domain", description="domain, or char for short tokens and no custom ones"
    )
    vocab_size: int | None = Field(
        default=None,
        ge=282,
        le=2**20,
        description="entries before padding, with room for custom ones; none is 32768, char 4096",
    )
    min_frequency: Count = Field(default=2, description="a pair seen less often is never merged")
    normalization: Literal["none", "nfc", "nfd", "nfkc", "nfkd"] = Field(
        default="nfkc", description="Unicode normal form of the input; nfc keeps ½, ™ and ²"
    )
    lowercase: bool = Field(default=False, description="lower-case the input")
    max_chars: int | None = Field(
        default=None, ge=2, le=1024, description="kind=char: longest token, in byte-level characters; none is 3"
    )
    custom_tokens: Annotated[tuple[str, ...], BeforeValidator(read_custom_tokens)] = Field(
        default=tuple(GROUPS),
        description="kind=domain: groups, further tokens, or a file with one a line; none for no tokens",
    )
    pad_to_power_of_two: bool = Field(default=True, description="fill up by whitespace runs, then reserved tokens")
    single_word_alpha: bool = Field(
        default=True,
        description="custom tokens of letters and digits match whole words only; false is the paper's code",
    )
    official_alphabet: bool = Field(
        default=False, description="start from chr(0) to chr(254) as the published char files do, and lose unseen bytes"
    )

    @model_validator(mode="after")
    def _fits(self) -> KL3M:
        if self.kind == "domain" and self.max_chars is not None:
            raise ValueError(
                f"max_chars={self.max_chars} bounds tokens of kind=char only; leave it out or set kind=char"
            )
        if self.kind == "char" and "custom_tokens" in self.model_fields_set and self.custom_tokens:
            raise ValueError("kind=char has no custom tokens; leave custom_tokens out or set kind=domain")
        least = 2 * len(SPECIAL_TOKENS) + len(self._alphabet() | BYTES) + len(self._custom())
        if self._size() < least:
            raise ValueError(
                f"vocab_size={self._size()} has no room for special tokens, bytes and {len(self._custom())} custom "
                f"tokens; give at least {least}" + (" or fewer custom tokens" if self._custom() else "")
            )
        return self

    def train(self, texts: Iterable[str]) -> PreTrainedTokenizerFast:
        """Train on documents, read once. What has no break in more than LONGEST_WORD bytes (a picture in base64, genes)
        is learned from in pieces of that length; no word is as long, so this changes no vocabulary of ordinary text.

        Raises:
            InputError: no text at all, or a document that is not text.
        """
        custom = self._custom()
        tokenizer = self._untrained()
        # Both sizes take the special tokens off twice, as the paper's code does.
        trainer = trainers.BpeTrainer(
            vocab_size=self._size() - len(SPECIAL_TOKENS) - len(custom),
            min_frequency=self.min_frequency,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(self._alphabet()),
            max_token_length=None if self.kind == "domain" else (self.max_chars or 3) + 1,  # the trainer means "below"
            show_progress=False,
        )
        whole = tokenizer.pre_tokenizer
        tokenizer.pre_tokenizer = _shortened(whole)
        tokenizer.train_from_iterator(_documents(texts), trainer)
        tokenizer.pre_tokenizer = whole
        self._add_custom(tokenizer, custom)
        if self.pad_to_power_of_two:
            _pad(tokenizer)
        roles = {f"{role}_token": token for role, token in zip(ROLES, SPECIAL_TOKENS)}
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, padding_side="left", clean_up_tokenization_spaces=False, **roles
        )

    def _size(self) -> int:
        return self.vocab_size or (32768 if self.kind == "domain" else 4096)

    def _alphabet(self) -> frozenset[str]:
        return OFFICIAL_ALPHABET if self.official_alphabet else BYTES

    def _untrained(self) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE())
        steps = [NORMALIZERS[self.normalization]()] if self.normalization != "none" else []
        steps += [normalizers.Lowercase()] if self.lowercase else []
        if steps:
            tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def _custom(self) -> list[str]:
        """The custom tokens, sorted; those that could not work are refused."""
        if self.kind == "char":
            return []
        own = {token for token in self.custom_tokens if token not in GROUPS}
        normalizer, decoder = self._untrained().normalizer, decoders.ByteLevel()
        for token in sorted(own):
            check_encodable(token, "a custom token")
            self._check(token, normalizer.normalize_str(token) if normalizer else token, decoder.decode([token]))
        groups = [name for name in self.custom_tokens if name in GROUPS]
        return sorted(own.union(custom_tokens(groups, self.lowercase)))

    def _check(self, token: str, normal: str, decoded: str) -> None:
        if not token:
            raise InputError("a custom token is empty; take it out")
        if token in SPECIAL_TOKENS:
            raise InputError(f"the custom token {token!r} is a special token already; take it out")
        if normal != token:
            raise InputError(
                f"the custom token {token!r} becomes {normal!r} under normalization={self.normalization}, "
                f"lowercase={self.lowercase}, so it would never come back; give {normal!r}"
            )
        if decoded != token:
            raise InputError(
                f"the custom token {token!r} would decode to {decoded!r}, because all its characters stand for bytes; "
                "leave it to BPE"
            )

    def _add_custom(self, tokenizer: Tokenizer, custom: Sequence[str]) -> None:
        learned = tokenizer.get_vocab()
        tokenizer.add_tokens(
            [
                AddedToken(token, normalized=True, single_word=self.single_word_alpha and token.isalnum())
                for token in custom
                if token not in learned
            ]
        )


SPECIAL_TOKENS = (
    "<|start|>",
    "<|end|>",
    "<|pad|>",
    "<|unk|>",
    "<|sep|>",
    "<|cls|>",
    "<|mask|>",
    "<|system|>",
    "</|system|>",
    "<|user|>",
    "</|user|>",
    "<|instruction|>",
    "</|instruction|>",
)
ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")  # of the first special tokens
BYTES = frozenset(pre_tokenizers.ByteLevel.alphabet())
OFFICIAL_ALPHABET = frozenset(map(chr, range(255)))
LONGEST_RUN = 16  # longer whitespace padding is dead weight
LONGEST_WORD = 1024  # bytes without a break that merges are learned from at once; their cost goes with the square
NORMALIZERS = {
    "nfc": normalizers.NFC,
    "nfd": normalizers.NFD,
    "nfkc": normalizers.NFKC,
    "nfkd": normalizers.NFKD,
}


def _documents(texts: Iterable[str]) -> Iterator[str]:
    """The documents that are not empty; refuses an input without any before training begins."""
    if isinstance(texts, str):
        raise InputError("texts is one string; give a list of documents, for example [text]")
    documents = _checked(texts)
    first = next(documents, None)
    if first is None:
        raise InputError("there is no training text; give at least one document that is not empty")
    return chain([first], documents)


def _checked(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"document {number} is of type {type(text).__name__}, not text; give strings, not token ids or bytes"
            )
        check_encodable(text, f"document {number}")
        if text:
            yield text


def _shortened(words: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """The same words, cut where they are longer than LONGEST_WORD."""
    return pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD)])


def _pad(tokenizer: Tokenizer) -> None:
    """Fill up to the next power of two: 2 spaces, 2 newlines, 3 spaces, ..., then reserved special tokens."""
    vocabulary = tokenizer.get_vocab()
    size = len(vocabulary)
    missing = (1 << (size - 1).bit_length()) - size
    runs = [character * n for n in range(2, LONGEST_RUN + 1) for character in " \n"]
    pads = [run for run in runs if run not in vocabulary][:missing]
    tokenizer.add_tokens([AddedToken(run, normalized=True) for run in pads])
    tokenizer.add_special_tokens([f"<|reserved_{i}|>" for i in range(missing - len(pads))])
