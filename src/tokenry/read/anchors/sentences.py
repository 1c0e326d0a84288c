"""The sentences of a text and of a trace."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from ...core.errors import InputError
from ...text.sentences import Sentence, locate_sentences, thought
from ...text.spans import text_offsets
from ...trace.trace import Trace

__all__ = ["at_least", "segment_sentences", "sentences_of"]

SPARE = 4  # values of which a kurtosis says something


def segment_sentences(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Sentence]:
    """The sentences between the think tags of a text (of all of it without them), with the tokens it is read as."""
    ids = tokenizer(text).input_ids
    read, offsets = text_offsets(tokenizer, ids)
    return locate_sentences(read, offsets, *thought(read))


def sentences_of(trace: Trace) -> list[Sentence]:
    """The sentences of a trace's thinking; without any, of all after the prompt; of a trace that is all prompt, of
    the whole text.

    Raises:
        InputError: the trace was captured without a tokenizer.
    """
    offsets, text = trace.offsets, trace.text
    prompt = max((stop for _, stop in trace.spans["prompt"]), default=0)
    begin = int(offsets[prompt, 0]) if prompt < len(trace) else 0
    return locate_sentences(text, offsets, *thought(text, begin))


def at_least(sentences: list[Sentence], proximity: int) -> None:
    """Refuse a text with too few sentences for a kurtosis over those that are `proximity` or more back.

    Raises:
        InputError: it has.
    """
    if len(sentences) < proximity + SPARE:
        raise InputError(
            f"there are {len(sentences)} sentences; thought anchors need at least {proximity + SPARE} "
            f"(proximity {proximity} and {SPARE} more), so give a longer text or a smaller proximity"
        )
