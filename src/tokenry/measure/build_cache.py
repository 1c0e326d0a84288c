"""What a comparison builds before it measures, and keeps in the cache folder for the next time."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.files import explained
from ..core.hashes import digest
from ..core.outputs import write_file
from ..models.anatomy import fingerprint
from ..models.load import cache_folder

__all__ = ["digest", "kept_folder", "read", "tokenizer_hash", "write"]

T = TypeVar("T")


def kept_folder(
    slug: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, revision: int = 1, **more: PreTrainedModel
) -> Path:
    """Where an experiment keeps what it makes with these weights and this tokenizer, at this version of tokenry.

    Args:
        revision: of the experiment; goes up when what it makes changes and no setting says so.
        more: further models that it depends on.
    """
    others = {name: fingerprint(one) for name, one in more.items()}
    return (
        cache_folder()
        / slug
        / fingerprint(model)
        / digest([tokenizer_hash(tokenizer), version("tokenry"), revision, others])
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A short hash of all that decides how a text becomes ids: vocabulary, merges, normalizer, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for use in ("padding", "truncation") if backend is not None else ():
        state.pop(use, None)  # of the last call
    return digest([state, tokenizer.chat_template, tokenizer.special_tokens_map])


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """A file, complete or absent, also with two writers at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, save)


def read(path: Path, load: Callable[[Path], T]) -> T:
    """What `load` makes of a kept file; one that is broken is refused."""
    with explained(f"what was kept in {str(path)!r} cannot be read", "delete it, and it is made again"):
        return load(path)
