"""What a comparison builds before it measures, and keeps in the cache folder for the next time."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.files import explained, read_json
from ..core.hashes import digest
from ..core.outputs import write_file, write_folder
from ..models.anatomy import fingerprint
from ..models.folders import cache_folder
from ..models.prompts import tokenizer_hash

__all__ = ["built_folder", "built_json", "built_once", "digest", "kept_folder", "read", "write"]

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


def built_once(path: Path, make: Callable[[], T], save: Callable[[T, Path], Any], load: Callable[[Path], T]) -> T:
    """What is kept at `path`; made and kept where it is not there yet. It is read again even then, so that a second
    run has exactly what the first one had."""
    if not path.exists():
        made = make()
        write(path, partial(save, made))
    return read(path, load)


def built_json(path: Path, make: Callable[[], Any]) -> Any:
    """`built_once` for JSON values."""
    return built_once(path, make, lambda made, part: part.write_text(json.dumps(made), encoding="utf-8"), read_json)


def built_folder(path: Path, make: Callable[[], Callable[[Path], Any]]) -> Path:
    """`path`, a folder; made where it is not there yet. `make` gives the function that saves what it has made."""
    if not path.exists():
        write_folder(path, make())
    return path


def write(path: Path, save: Callable[[Path], Any]) -> None:
    """A file, complete or absent, also with two writers at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, save)


def read(path: Path, load: Callable[[Path], T]) -> T:
    """What `load` makes of a kept file; one that is broken is refused."""
    with explained(f"what was kept in {str(path)!r} cannot be read", "delete it, and it is made again"):
        return load(path)
