"""A conversation in a tokenizer's chat template: the template comes with a model, and may raise anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from .errors import InputError

__all__ = ["rendered"]

# What an expression of a template can raise: jinja's own errors, and those of the Python operations in it.
RAISED = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
    """The text of messages in the chat template.

    Args:
        options: of `apply_chat_template`, such as add_generation_prompt.

    Raises:
        InputError: the template cannot take these messages, or is none, or makes nothing of them.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except RAISED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"the chat template of the tokenizer fails ({reason[:200]}); use chat=False (--raw), or mend the template"
        ) from error
    if not text.strip():
        raise InputError(
            "the chat template of the tokenizer makes nothing of the messages; use chat=False (--raw), or mend it"
        )
    return text
