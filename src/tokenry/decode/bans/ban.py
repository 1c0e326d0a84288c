"""What every ban shares: strength, repair options, and the text of a row as bans compare it."""

from __future__ import annotations

from collections.abc import Iterable

import regex
from transformers import PreTrainedTokenizerBase

from ...core.errors import InputError
from ...text.token_text import special_tokens
from ...text.words import FoldedText, WordList
from ..generation.monitor import Violation
from ..generation.sequence import SequenceState

__all__ = ["Ban", "folded_text", "word_list"]


class Ban:
    """A monitor's strength and repair options, and the violation it raises."""

    def __init__(
        self,
        strength: float = 1.0,
        *,
        force_backtrack: bool = False,
        invert_probs: bool = False,
        max_retries: int = 100,
    ) -> None:
        if not 0 <= strength <= 1:
            raise InputError(f"strength={strength} is not allowed; give a number in [0, 1], 1 for a hard ban")
        if max_retries < 1:
            raise InputError(f"max_retries={max_retries} is not allowed; give a number >= 1")
        self.factor = 0.0 if strength == 1 else 10.0 ** (-10 * strength)
        self.active = strength > 0
        self.repair = {"invert": invert_probs, "retries": max_retries, "relax": force_backtrack}
        self.written: list[str] = []  # the patterns as the user gave them

    def begin(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse patterns with special tokens: they are not text, so that nothing would ever match."""
        everything = "\n".join(self.written)
        for token, number in special_tokens(tokenizer).items():
            if token in everything or regex.escape(token) in everything:
                raise InputError(
                    f"the pattern {self._with(token)!r} holds the special token {token!r}, which is not text and "
                    f"cannot be banned as text; use suppress_tokens=[{number}]"
                )

    def _with(self, token: str) -> str:
        return next(text for text in self.written if token in text or regex.escape(token) in text)

    def violation(self, row: SequenceState, rule: str, start: int, stop: int, also: Iterable[int] = ()) -> Violation:
        index = row.token_at(start)
        factors = dict.fromkeys((row.ids[index], *also), self.factor)
        return Violation(index, rule, factors, span=(start, stop), **self.repair)

    def tokens_from(self, row: SequenceState, char: int | None) -> int:
        """How many tokens a rewind to `char` would take back, with those that are not text yet."""
        first = row.decoded.done if char is None else min(row.token_at(char), row.decoded.done)
        return len(row.ids) - first


def folded_text(row: SequenceState) -> FoldedText:
    """The row's text as it is compared; all monitors share it."""
    return row.note(FoldedText, FoldedText).follow(row.text)


def word_list(row: SequenceState) -> WordList:
    """The words of the row's text; all monitors share them."""
    return row.note(WordList, WordList).follow(folded_text(row))
