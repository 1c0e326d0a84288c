"""What stands beside the weights in a GGUF file: configuration and tokenizer, as transformers reads them.

That takes about 20 s, so it is done once for each file, in the cache folder. The file is read with the package gguf
from end to end before llama.cpp sees it, which trusts much of what it reads.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from gguf import GGUFReader
from transformers import AutoConfig, AutoTokenizer

from ...core.errors import InputError
from ...core.files import refusing
from ..checkpoint_files import MALFORMED
from ..conversions import converted
from ..folders import cache_folder
from ..kinds import kind_of

__all__ = ["described"]


def described(file: Path) -> Path:
    """The folder with the configuration and the tokenizer of a GGUF file.

    Raises:
        InputError: no GGUF file, a broken one, or of an architecture that transformers cannot read.
    """
    with refusing(lambda error: _why(file, error), *MALFORMED):
        state = file.stat()
        name = f"{file.resolve()} {state.st_size} {state.st_mtime_ns}"
        target = cache_folder() / "gguf" / f"{file.stem[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        return converted(file, target, _describe)


def _describe(file: Path, folder: Path) -> None:
    reader = GGUFReader(file)  # which looks at every field, and at where the tensors lie
    if not reader.tensors:
        raise ValueError("it has no tensors")
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    if kind_of(config) not in ("causal", "ssm"):
        raise InputError(
            f"the GGUF file {str(file)!r} holds a model of the kind {kind_of(config)} ({config.model_type}); give a "
            "causal language model"
        )
    where = {"gguf_file": file.name, "padding_side": "left"}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, trust_remote_code=False, **where)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _why(file: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        return f"there is no file {str(file)!r}; give a GGUF file that exists"
    if "is not supported yet" in text or "architecture" in text:
        return (
            f"the GGUF file {str(file)!r} is of an architecture that transformers cannot read ({text[:200]}); use "
            "another one"
        )
    reason = f"{type(error).__name__}: {text[:200] or 'no more is said'}"
    return f"the GGUF file {str(file)!r} is broken or none ({reason}); download or convert it again"
