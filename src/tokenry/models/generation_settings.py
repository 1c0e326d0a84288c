"""What a model's folder says about generation (generation_config.json), checked when the model is loaded: `generate`
would fail inside with whatever a wrong value leads to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

from ..core.errors import InputError
from ..core.fields import Positive, Times, TokenId, shown

__all__ = ["GenerationSettings", "check_generation_settings", "read_generation_settings"]

Ids = TokenId | list[TokenId] | None


class GenerationSettings(BaseModel):
    """The settings that act whatever a caller asks for; how to sample is for the caller to say."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")

    eos_token_id: Ids = None
    bos_token_id: Ids = None
    pad_token_id: Ids = None
    forced_bos_token_id: Ids = None
    forced_eos_token_id: Ids = None
    suppress_tokens: list[TokenId] | None = None
    begin_suppress_tokens: list[TokenId] | None = None
    bad_words_ids: list[list[TokenId]] | None = None
    num_return_sequences: int | None = None
    repetition_penalty: Positive | None = None
    no_repeat_ngram_size: Times | None = None
    min_length: Times | None = None
    min_new_tokens: Times | None = None


IDS = {name for name in GenerationSettings.model_fields if name.endswith(("_token_id", "suppress_tokens", "words_ids"))}
IDS -= {"bos_token_id"}  # no text is begun with it here, and small models often carry that of GPT-2


def read_generation_settings(folder: str, name: str) -> GenerationSettings:
    """The settings of a folder or hub id; the defaults where there is no file of them.

    Raises:
        InputError: a value of another type or out of range, or several texts for each prompt.
    """
    path = cached_file(folder, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
    given = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    if not isinstance(given, dict):
        raise InputError(f"{GENERATION_CONFIG_NAME} of the model {name!r} is no object; mend it, or take it away")
    try:
        settings = GenerationSettings(**given)
    except ValidationError as error:
        problem = error.errors()[0]
        raise _refusal(name, str(problem["loc"][0]), given, problem["msg"].lower()) from None
    if settings.num_return_sequences not in (None, 1):
        raise _refusal(name, "num_return_sequences", given, "each prompt gets one text")
    return settings


def check_generation_settings(settings: GenerationSettings, vocabulary: int, name: str) -> None:
    """Refuse token ids beyond the vocabulary."""
    given = settings.model_dump(include=IDS, exclude_none=True)
    for key, value in given.items():
        if max(_ids(value), default=0) >= vocabulary:
            raise _refusal(name, key, given, f"the vocabulary has {vocabulary} tokens")


def _ids(value: Any) -> Iterator[int]:
    for part in value if isinstance(value, list) else [value]:
        yield from _ids(part) if isinstance(part, list) else [part]


def _refusal(name: str, key: str, given: dict[str, Any], reason: str) -> InputError:
    return InputError(
        f"the model {name!r} asks for {key}={shown(given[key])}, which cannot be used ({reason}); mend its "
        f"{GENERATION_CONFIG_NAME}"
    )
