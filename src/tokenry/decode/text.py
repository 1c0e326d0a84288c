"""The text of a growing and shrinking list of token ids, with the character at which each token begins."""

from __future__ import annotations

from bisect import bisect_right

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are not a whole character yet


class TokenText:
    """Text coordinates of one row.

    `text` is the decoded generated part, never the prompt; `starts[i]` the character offset at which token i
    begins. Bytes of an unfinished character are not text yet. Each append decodes only the last few tokens;
    the lead before them keeps leading spaces and multi-byte characters right.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: list[int]) -> None:
        self.tokenizer = tokenizer
        self.context = context[-2:]
        self.ids: list[int] = []
        self.starts: list[int] = []
        self.settled: list[int] = []  # per token: how many tokens were text before it was appended
        self.done = 0  # tokens whose text is in `text`
        self.text = ""

    def append(self, token: int) -> None:
        self.starts.append(len(self.text))
        self.settled.append(self.done)
        self.ids.append(token)
        lead = self._lead()
        before, after = self._decode(lead, self.done), self._decode(lead, len(self.ids))
        if after.endswith(REPLACEMENT) and not before.endswith(REPLACEMENT):
            return
        self.text += after[len(before) :]
        self.done = len(self.ids)

    def truncate(self, count: int) -> None:
        """Keep the first `count` tokens."""
        if count >= len(self.ids):
            return
        self.text = self.text[: self.starts[count]]
        self.done = self.settled[count]
        del self.ids[count:], self.starts[count:], self.settled[count:]

    def token_at(self, char: int) -> int:
        """The token that character `char` belongs to: the largest i with starts[i] <= char."""
        return bisect_right(self.starts, char) - 1

    def _lead(self) -> int:
        return max(self.done - 2, -len(self.context))

    def _decode(self, lead: int, stop: int) -> str:
        ids = self.context[lead:] + self.ids[:stop] if lead < 0 else self.ids[lead:stop]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
