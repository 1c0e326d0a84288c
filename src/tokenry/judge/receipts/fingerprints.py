"""Fingerprints: embeddings of hidden tokens and of blocks of them, rounded so that two machines agree on what is
hashed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.files import explained
from ...models.embedders import Embedder
from ...models.prompts import tokenizer_hash
from ...text.token_text import check_encodable

__all__ = ["STEPS", "Fingerprinter", "blocks_of"]

STEPS = 127  # of a number in [0, 1]
ANSWER_WORDS = 120  # of an answer that are embedded together


def blocks_of(n: int, size: int) -> list[range]:
    """The positions of blocks of `size` consecutive tokens; the last one may be shorter."""
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


class Fingerprinter:
    """Embeds texts by a public model that belongs to neither side.

    A fingerprint is the embedding at length 1, times 127, rounded: whole numbers that hash alike everywhere. Batches
    and machines may move a number by one step, so that who embeds again compares within one.

    Args:
        tokenizer: the one that counts.
    """

    def __init__(self, embedder: Embedder, tokenizer: PreTrainedTokenizerBase) -> None:
        self.embedder, self.tokenizer = embedder, tokenizer
        self.tokenizer_hash = tokenizer_hash(tokenizer)
        self.width = 0  # known from the first texts on
        self._tokens: dict[int, np.ndarray] = {}

    def tokens(self, ids: Sequence[int]) -> np.ndarray:
        """(n, width) int8, of each token's own text."""
        missing = [i for i in dict.fromkeys(ids) if i not in self._tokens]
        if missing:
            found = self.texts([self.text([i]) for i in missing])
            self._tokens.update(zip(missing, found))
        return np.stack([self._tokens[i] for i in ids])

    def blocks(self, ids: Sequence[int], size: int) -> np.ndarray:
        """(blocks, width) int8, of the text of every `size` tokens."""
        return self.texts([self.text([ids[i] for i in block]) for block in blocks_of(len(ids), size)])

    def answer(self, text: str) -> np.ndarray:
        """(parts, width) int8, of an answer cut into parts of 120 words.

        Raises:
            InputError: an empty answer, or half a surrogate pair.
        """
        check_encodable(text, "the answer")
        words = text.split()
        if not words:
            raise InputError(f"the answer {text[:20]!r} is empty; give the text that the user saw")
        return self.texts([" ".join(words[i : i + ANSWER_WORDS]) for i in range(0, len(words), ANSWER_WORDS)])

    def text(self, ids: Sequence[int]) -> str:
        """What tokens stand for, special ones too."""
        return cast(
            str, self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, width) int8; of a single text (1, width).

        Raises:
            InputError: embeddings that are not finite, or of another width than those before.
        """
        name, texts = self.embedder.name, [texts] if isinstance(texts, str) else list(texts)
        with explained(f"the embedder {name!r} failed", "give one that makes a vector of each text"):
            vectors = np.asarray(self.embedder.embed(texts), dtype=np.float64)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not vectors.shape[1]:
            raise InputError(f"{name!r} makes {vectors.shape} of {len(texts)} texts; give a vector (width,) for each")
        if not np.isfinite(vectors).all():
            raise InputError(f"{name!r} makes embeddings that are not finite; give another embedder")
        if self.width and self.width != vectors.shape[1]:
            raise InputError(
                f"{name!r} makes embeddings of width {vectors.shape[1]} after {self.width}; give one that keeps it"
            )
        self.width = vectors.shape[1]
        length = np.linalg.norm(vectors, axis=1, keepdims=True)
        return np.rint(STEPS * vectors / np.maximum(length, 1e-12)).astype(np.int8)
