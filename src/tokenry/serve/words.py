"""The text of tokens as it is given out, the same however the tokens were cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from ..text.token_text import TokenText, special_tokens

__all__ = ["Words"]


class Words:
    """The text of settled tokens: no half characters, and nothing from a stop string on.

    Of several stop strings the one counts that is complete first, as in the decode loop, which looks after every token;
    of those that end at the same character the longest.

    Args:
        prompt: the ids before the text.
        stop: what ends the text. Special tokens among them are no text: the decode loop ends at their ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.decoded = TokenText(tokenizer, list(prompt))
        special = special_tokens(tokenizer) if stop else ()
        self.stop = [one for one in stop if one not in special]
        self.given = 0  # characters
        self.stopped = False

    def add(self, ids: Sequence[int], last: bool = False) -> str:
        """What these tokens add. What may be the beginning of a stop string waits, unless they are the last."""
        for token in ids:
            self.decoded.append(token)
        if self.stopped:
            return ""
        new = self.decoded.text[self.given :] + (self.decoded.unfinished() if last else "")
        ends = [(place + len(one), place) for one in self.stop if (place := new.find(one)) >= 0]
        if ends:
            self.stopped, new = True, new[: min(ends)[1]]
        elif not last:
            new = new[: len(new) - self._waiting(new)]
        self.given += len(new)
        return new

    def offsets(self, count: int) -> list[int]:
        """The characters at which the last `count` tokens begin, also those that are not given out."""
        return self.decoded.starts[len(self.decoded.starts) - count :]

    def _waiting(self, text: str) -> int:
        """How many of the last characters may belong to a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        counts = range(min(longest, len(text)), 0, -1)
        return next((n for n in counts if any(one.startswith(text[-n:]) for one in self.stop)), 0)
