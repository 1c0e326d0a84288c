"""The text of a growing and shrinking list of token ids, with the character at which each token begins."""

from __future__ import annotations

from bisect import bisect_right
from copy import copy
from typing import cast

from transformers import PreTrainedTokenizerBase

from ..core.errors import InputError

REPLACEMENT = "\ufffd"  # what decoding gives for bytes that are not a whole character yet


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """{special token: its id}: what `skip_special_tokens` leaves out of the text."""
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**added, **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))}


def check_encodable(text: str, name: str) -> None:
    """Refuse a text that is not Unicode: half a pair of surrogates, which no tokenizer takes.

    Raises:
        InputError: with the name of the text, and where it is.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} has half a surrogate pair, {text[error.start]!r}, at character {error.start}, which is no text; "
            "read it with errors='replace', or take it out"
        ) from None


class TokenText:
    """Text coordinates of one row.

    `text` is the decoded generated part, never the prompt; `starts[i]` the character offset at which token i
    begins. Bytes of an unfinished character are not text yet; the tokens of one character all begin at it. Each
    append decodes only the last few tokens; the lead before them keeps leading spaces right.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: list[int], skip_special: bool = True) -> None:
        self.tokenizer, self.skip_special = tokenizer, skip_special
        self.context = context[-1:]
        self.ids: list[int] = []
        self.starts: list[int] = []
        self.before: list[tuple[int, int]] = []  # per token: (lead, done) when it was appended
        self.lead = -len(self.context)  # decoding begins here, always at the border of a character
        self.done = 0  # tokens whose text is in `text`
        self.text = ""

    def append(self, token: int) -> None:
        self.starts.append(len(self.text))
        self.before.append((self.lead, self.done))
        self.ids.append(token)
        known, now = self._decode(self.done), self._decode(len(self.ids))
        if now.endswith(REPLACEMENT):
            return
        self.text += now[len(known) :]
        self.lead, self.done = self.done, len(self.ids)

    def unfinished(self) -> str:
        """What decoding gives for the bytes of a character that is not whole yet."""
        return self._decode(len(self.ids))[len(self._decode(self.done)) :]

    def truncate(self, count: int) -> None:
        """Keep the first `count` tokens."""
        if count >= len(self.ids):
            return
        self.text = self.text[: self.starts[count]]
        self.lead, self.done = self.before[count]
        del self.ids[count:], self.starts[count:], self.before[count:]

    def prefix(self, count: int) -> TokenText:
        """A copy of the first `count` tokens."""
        part = copy(self)
        part.ids, part.starts, part.before = self.ids[:count], self.starts[:count], self.before[:count]
        if count < len(self.ids):
            part.text = self.text[: self.starts[count]]
            part.lead, part.done = self.before[count]
        return part

    def token_at(self, char: int) -> int:
        """The token that character `char` belongs to: the largest i with starts[i] <= char."""
        return bisect_right(self.starts, char) - 1

    def _decode(self, stop: int) -> str:
        ids = self.context + self.ids[:stop] if self.lead < 0 else self.ids[self.lead : stop]
        text = self.tokenizer.decode(ids, skip_special_tokens=self.skip_special, clean_up_tokenization_spaces=False)
        return cast(str, text)  # one text of a flat list
