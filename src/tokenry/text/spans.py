"""Where tokens lie in the text: characters of each token, and token spans of prompt, thinking, answer, sentences."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .token_text import TokenText

__all__ = ["Span", "find_spans", "text_offsets"]

Span = tuple[int, int]


def text_offsets(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, Tensor]:
    """The text of `ids`, special tokens included, and the characters (T, 2) of each token."""
    decoded = TokenText(tokenizer, [], skip_special=False)
    for token in ids:
        decoded.append(token)
    offsets, end, after = [], len(decoded.text), len(decoded.text)
    for start in reversed(decoded.starts):
        if start < after:  # tokens of one character share its offsets
            end, after = after, start
        offsets.append((start, end))
    return decoded.text, torch.tensor(offsets[::-1]).reshape(-1, 2)


def find_spans(text: str, starts: Tensor | None, total: int, prompt: int) -> dict[str, list[Span]]:
    """Half-open token spans of the prompt, the thinking, the answer, and the sentences after the prompt.

    Thinking ends with `</think>` and begins where the prompt ends, since templates write `<think>` there.

    Args:
        starts: (total,) first character of each token; without them there is only prompt and answer.
        prompt: tokens of the prompt.
    """
    spans: dict[str, list[Span]] = {"prompt": [(0, prompt)], "think": [], "answer": [(prompt, total)], "sentences": []}
    if starts is not None and prompt < total:
        first = int(starts[prompt])

        def tokens(begin: int, end: int) -> Span:
            a, b = torch.searchsorted(starts, torch.tensor([begin, end])).tolist()
            return max(a, prompt), b if end < len(text) else total

        opened, close = "<think>" in text[first:], text.find("</think>", first)
        if close >= 0 or opened or text[:first].rstrip().endswith("<think>"):
            thought = tokens(first, close + len("</think>") if close >= 0 else len(text))
            spans["think"], spans["answer"] = [thought], [(thought[1], total)]
        spans["sentences"] = [tokens(a, b) for a, b in _sentences(text, first)]
    return {name: [(a, b) for a, b in found if a < b] for name, found in spans.items()}


def _sentences(text: str, begin: int) -> list[Span]:
    """Character spans that end at a full stop before white space, at a line's end, or at the end."""
    found = []
    for match in re.finditer(r"[.!?]+(?=\s)|\n+|\Z", text[begin:]):
        start, end = found[-1][1] if found else begin, begin + match.end()
        if text[start:end].strip():
            found.append((start, end))
    return found
