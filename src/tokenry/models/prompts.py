"""Prompts in all their forms: texts, conversations and token ids, one or several, and what a model reads of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import jinja2
import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.hashes import digest
from ..text.token_text import check_encodable
from .batch import left_padded, pad_id, shared_length

__all__ = [
    "Prompt",
    "Prompts",
    "encode_prompts",
    "listed_prompts",
    "prompt_ids",
    "question_ids",
    "rendered",
    "tokenizer_hash",
]


Messages = Sequence[Mapping[str, Any]]  # a conversation: mappings with role and content
Prompt = str | Messages
Ids = Sequence[int] | Tensor
Prompts = str | Messages | Ids | Mapping[str, Any] | Sequence[str | Messages | Ids]

# What an expression of a template can raise: jinja's own errors, and those of the Python operations in it.
RAISED = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The text of messages in the chat template.

    Args:
        options: of `apply_chat_template`, such as add_generation_prompt.

    Raises:
        InputError: the template cannot take these messages, or is none, or makes nothing of them.
    """
    try:
        text = cast(str, tokenizer.apply_chat_template(cast(list, messages), tokenize=False, **options))
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


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Prompts, chat: bool = True) -> BatchEncoding:
    """Left-padded `input_ids` and `attention_mask` of the prompts.

    Args:
        prompts: one or several of them: texts; conversations, each a list of messages with role and content; lists or
            tensors of token ids. Or a batch: a mapping with `input_ids`, as tokenizers return it, or a tensor of ids
            (batch, time); these stay as they are.
        chat: put texts through the chat template where the tokenizer has one, as a message of the user.

    Raises:
        InputError: an empty prompt, anything else, a conversation without a chat template.
    """
    if isinstance(prompts, Mapping):
        return _batch(prompts)
    if isinstance(prompts, Tensor) and prompts.dim() != 1:
        return _batch({"input_ids": prompts})
    rows = listed_prompts(prompts)
    if any(_is_ids(row) for row in rows):
        if not all(_is_ids(row) and len(row) for row in rows):
            raise InputError("some prompts are ids and some are not, or empty; give ids for all of them, or texts")
        ids, mask = left_padded([torch.as_tensor(row).tolist() for row in rows], "cpu", pad_id(tokenizer))
        return BatchEncoding({"input_ids": ids, "attention_mask": mask.long()})
    if not rows or any(isinstance(p, str) and not p.strip() for p in rows):
        raise InputError("the prompt is empty; give some text to continue")
    for number, prompt in enumerate(rows):
        check_encodable(prompt if isinstance(prompt, str) else "", f"prompt {number}")
    turns = [[{"role": "user", "content": p}] if isinstance(p, str) else _conversation(p) for p in rows]
    if chat and tokenizer.chat_template:
        texts = [rendered(tokenizer, turn, add_generation_prompt=True) for turn in turns]
        return _tokenized(tokenizer, texts, add_special_tokens=False)
    if any(len(turn) > 1 or turn[0]["role"] != "user" for turn in turns):
        raise InputError(
            "a conversation needs a chat template; give a text, chat=True, or a tokenizer that has a template"
        )
    return _tokenized(tokenizer, [turn[0]["content"] for turn in turns])


def _tokenized(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: Any) -> BatchEncoding:
    return tokenizer(
        list(texts), return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False, **options
    )


def listed_prompts(prompts: Any, texts_only: str | None = None) -> list[Any]:
    """The prompts as a list, if it is only one, too: a text, a conversation, or ids (time,).

    Args:
        texts_only: why ids cannot be taken.

    Raises:
        InputError: none of these.
    """
    found = [] if texts_only and isinstance(prompts, Mapping | Tensor) else _listed(prompts)
    if texts_only and (not found or any(_is_ids(prompt) for prompt in found)):
        raise InputError(f"{texts_only}; give the questions as texts or messages, not ids, and at least one prompt")
    return found


def _listed(prompts: Any) -> list[Any]:
    if isinstance(prompts, str) or _is_ids(prompts):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InputError(
            f"prompts are of type {type(prompts).__name__}; give texts, conversations (lists of messages), or token ids"
        )
    if len(prompts) and isinstance(prompts[0], Mapping):
        return [prompts]
    for number, prompt in enumerate(prompts, 1):
        is_talk = isinstance(prompt, Sequence) and all(isinstance(turn, Mapping) for turn in prompt)
        if not (isinstance(prompt, str) or _is_ids(prompt) or is_talk):
            raise InputError(
                f"prompt {number} is of type {type(prompt).__name__}, not text; give texts, conversations (lists of "
                "messages), or token ids"
            )
    return list(prompts)


def _is_ids(prompt: Any) -> bool:
    if isinstance(prompt, Tensor):
        return prompt.dim() == 1 and not prompt.is_floating_point()
    numbers = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes) and len(prompt) > 0
    return numbers and all(isinstance(i, int) and not isinstance(i, bool) for i in prompt)


def _conversation(messages: Messages) -> list[dict[str, Any]]:
    if not messages or not all({"role", "content"} <= set(turn) for turn in messages):
        raise InputError(f"{messages!r} is no conversation; give messages with a role and a content each")
    if messages[-1]["role"] == "assistant" or not messages[-1]["content"] or not str(messages[-1]["content"]).strip():
        raise InputError(
            "the conversation ends with the assistant, or with nothing; end it with what is to be answered"
        )
    return [dict(turn) for turn in messages]


def _batch(given: Mapping[str, Any]) -> BatchEncoding:
    if "input_ids" not in given:
        raise InputError(
            f"prompts are a mapping of {', '.join(map(str, given)) or 'nothing'}; give one with input_ids, or messages "
            "in a list"
        )
    batch = {name: value if isinstance(value, Tensor) else torch.tensor(value) for name, value in given.items()}
    batch = {name: value[None] if value.dim() == 1 else value for name, value in batch.items()}
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0:
        raise InputError(
            f"input_ids are a tensor {tuple(ids.shape)} of {ids.dtype}; give ids (batch, time) of at least one token"
        )
    if mask is not None and mask.shape != ids.shape:
        raise InputError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}; give one for each"
        )
    return BatchEncoding(batch)


MARK = "\ue000"  # private use: no question and no template has it


# --- prompts -------------------------------------------------------------------------------------------------------


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, suffix: str = "", chat: bool = True) -> list[int]:
    """Token ids of a prompt whose last message has `suffix` behind it."""
    messages = _messages(prompt, suffix)
    for message in messages:
        check_encodable(message["content"], "the prompt")
    if chat and tokenizer.chat_template:
        text = rendered(tokenizer, messages, add_generation_prompt=True)
        return tokenizer.encode(text, add_special_tokens=False)
    if len(messages) > 1:
        raise InputError(
            f"{len(messages)} messages need a chat template; give one text, or a tokenizer with a template"
        )
    return tokenizer.encode(messages[0]["content"])


def question_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool = True) -> list[int]:
    """The first tokens of the prompt, up to the end of the question: those that any words behind it leave alone."""
    bare, marked = (prompt_ids(tokenizer, prompt, suffix, chat) for suffix in ("", MARK))
    return bare[: shared_length(bare, marked)]


def _messages(prompt: Prompt, suffix: str) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
    if not messages or messages[-1].get("role") != "user" or not messages[-1].get("content", "").strip():
        raise InputError(
            f"{prompt!r} does not end with a question; give some text, or messages of which the last is the user's"
        )
    messages[-1]["content"] += suffix
    return messages


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of all that decides how a text becomes ids: vocabulary, merges, normalizer, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for use in ("padding", "truncation") if backend is not None else ():
        state.pop(use, None)  # of the last call
    return digest([state, tokenizer.chat_template, tokenizer.special_tokens_map])


def template_hash(tokenizer: PreTrainedTokenizerBase, chat: bool) -> str:
    """A short hash of the template that questions are put into."""
    template = str(tokenizer.chat_template) if chat and tokenizer.chat_template else ""
    return hashlib.sha256(template.encode()).hexdigest()[:16]
