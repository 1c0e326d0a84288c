"""Which words of a translation differ from a reference, and how bad a second translation model finds those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...models.load import Loaded
from ...models.positions import fixed_positions
from .phrases import ORDER, Severity

__all__ = ["Tags", "annotate_severity", "check_room", "check_translator", "ter_tags"]

Rule = Literal["rank", "probability"]
RANKS = (4, 8, 30)  # the last ranks that are ok, minor and major
PROBABILITIES = (0.2, 0.04, 0.004)  # from which on a token is ok, minor and major


class Tags(NamedTuple):
    """Which words of a translation are not those of the reference, and whether words are missing at its `end`."""

    words: list[bool]
    end: bool


def ter_tags(translation: Sequence[str], reference: Sequence[str]) -> Tags:
    """By the fewest edits of words without shifts, as the tags of the WMT shared tasks are made.

    Raises:
        InputError: no words on either side, or sacrebleu is not installed.
    """
    if isinstance(translation, str) or isinstance(reference, str):
        raise InputError("a translation or reference is one text; give a list of words, such as text.split()")
    for name, words in (("translation", translation), ("reference", reference)):
        if not len(words):
            raise InputError(f"the {name} is empty; give one with words")
    try:
        from sacrebleu.metrics.lib_ter import BeamEditDistance, trace_to_alignment
    except ImportError:
        raise InputError("tags need sacrebleu; run `pip install 'tokenry[translation]'`") from None
    _, trace = BeamEditDistance(list(translation))(list(reference))  # the edits that make the translation of it
    return Tags([bool(wrong) for wrong in trace_to_alignment(trace)[2]], trace.endswith("d"))


def check_translator(loaded: Loaded, role: str) -> None:
    """Refuse what is no translation model."""
    if loaded.kind != "seq2seq":
        raise InputError(
            f"the {role} is a {type(loaded.model).__name__} of the kind {loaded.kind}; give a translation model, which "
            "has an encoder and a decoder, such as zoo/translator-a"
        )


def check_room(loaded: Loaded, batch: BatchEncoding, what: str) -> None:
    """Refuse texts of more tokens than a model has positions."""
    room, width = fixed_positions(loaded.model), batch["input_ids"].shape[1]
    if room is not None and width > room:
        raise InputError(
            f"a {what} has {width} tokens, the translation model {room} positions; shorten or leave it out"
        )


@torch.no_grad()
def annotate_severity(
    annotator: Loaded,
    sources: Sequence[str],
    translations: Sequence[Sequence[str]],
    tags: Sequence[Tags],
    rule: Rule = "rank",
    batch_size: int = 32,
) -> list[list[Severity]]:
    """How bad the words are that differ from a reference: of each translation its words', then its end's.

    The annotator reads the source and is made to write the translation. A token that differs is as bad as it is
    unlikely: by its rank among all tokens, or by its probability. A word is as bad as its worst token.

    Raises:
        InputError: no translation model, a tokenizer that cannot say which token is of which word, unequal numbers of
            sentences, tags of another number than words, or a text of more tokens than the model has positions.
    """
    check_translator(annotator, "annotator")
    if isinstance(sources, str) or not len(sources) == len(translations) == len(tags):
        raise InputError("sources, translations and tags are not as many; give three lists with one of each sentence")
    for i, (words, tag) in enumerate(zip(translations, tags)):
        if len(words) != len(tag.words):
            raise InputError(f"translation {i + 1} has {len(words)} words and {len(tag.words)} tags; give one for each")
    found: list[list[Severity]] = []
    for first in range(0, len(translations), batch_size):
        part = slice(first, first + batch_size)
        levels, targets = _levels(annotator, sources[part], translations[part], rule)
        for i, (row, tag) in enumerate(zip(levels.tolist(), tags[part])):
            worst = [0] * (len(tag.words) + 1)
            for level, word in zip(row, _words_of(targets, i, len(tag.words))):
                if word is not None:
                    worst[word] = max(worst[word], level)
            bad = [*tag.words, tag.end]
            found.append([ORDER[level if wrong else 0] for level, wrong in zip(worst, bad)])
    return found


def _levels(
    annotator: Loaded, sources: Sequence[str], translations: Sequence[Sequence[str]], rule: Rule
) -> tuple[Tensor, BatchEncoding]:
    """The level (rows, time) of every token of the translations, 0 for ok, and their encoding."""
    model, tokenizer = annotator
    asked = encoded(tokenizer, sources).to(model.device)
    targets = word_tokens(tokenizer, text_target=[list(words) for words in translations])
    check_room(annotator, asked, "source")
    check_room(annotator, targets, "translation")
    labels = targets["input_ids"].to(model.device)
    logits = model(**asked, labels=labels, use_cache=False).logits.float()
    if rule == "rank":
        own = logits.gather(2, labels[..., None])
        worse = [(logits > own).sum(-1) >= bound for bound in RANKS]
    else:
        p = logits.softmax(-1).gather(2, labels[..., None])[..., 0]
        worse = [p < bound for bound in PROBABILITIES]
    return torch.stack(worse).sum(0), targets


def _words_of(targets: BatchEncoding, row: int, words: int) -> list[int | None]:
    """The word of each token of a row; the end-of-text token, and what stands before it, is word number `words`."""
    ids, mask = targets.word_ids(row), targets["attention_mask"][row].tolist()
    last = max(i for i, there in enumerate(mask) if there)
    return [words if i == last and word is None else word for i, word in enumerate(ids)]


def encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> BatchEncoding:
    """Texts as the encoder reads them."""
    batch = tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right")
    batch.pop("token_type_ids", None)
    return batch


def word_tokens(tokenizer: PreTrainedTokenizerBase, **texts: list[list[str]]) -> BatchEncoding:
    """Lists of words as tokens, which know their words.

    Raises:
        InputError: a tokenizer that does not say which token is of which word.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} does not know which token is of which word; use a model with a fast tokenizer"
        )
    return tokenizer(**texts, is_split_into_words=True, return_tensors="pt", padding=True, padding_side="right")  # pyright: ignore[reportArgumentType]
