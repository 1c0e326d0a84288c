"""The vocabulary of values, a byte-level BPE in which no token holds parts of two values; and that of types."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ...core.errors import InputError
from ...text.code.lexer import EOS, SPECIAL
from ...text.code.views import TYPES

__all__ = ["TYPE_IDS", "encode_values", "value_tokenizer"]

PAD = "<PAD>"
TYPE_IDS = {name: number for number, name in enumerate(TYPES)}


def value_tokenizer(values: Iterable[tuple[str, ...]], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer for texts in which a space stands before every value, learned from programs.

    The end of a statement is its end-of-text token: plain `generate` writes a statement.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(" ?[^ ]+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(mark, lstrip=True, special=True) for mark in (PAD, *SPECIAL)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    marks = set(SPECIAL)
    texts = (" " + " ".join(value for value in program if value not in marks) for program in values)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[mark for mark in SPECIAL if mark != EOS],
        clean_up_tokenization_spaces=False,
    )


def encode_values(tokenizer: PreTrainedTokenizerBase, values: tuple[str, ...]) -> list[list[int]]:
    """The tokens of each value; one after the other they are those of the whole text.

    Raises:
        InputError: a tokenizer that does not know the ends of statements.
    """
    if tokenizer.eos_token != EOS:
        raise InputError(
            f"the tokenizer ends texts with {tokenizer.eos_token!r}, not {EOS!r}; use the one that codefill has trained"
        )
    unique = list(dict.fromkeys(values))
    encoded = tokenizer([" " + value for value in unique], add_special_tokens=False).input_ids
    ids = dict(zip(unique, encoded))
    return [ids[value] for value in values]
