"""The seam where the files of a checkpoint come in: they are another's, and may be broken, incomplete, or code.

with reading("my-model"):                                # whatever a reader trips over becomes one sentence
    config = read_config("my-model")
    model, found = AutoModelForCausalLM.from_pretrained(..., output_loading_info=True)
    check_weights(found, type(model).__name__)
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, cached_file, is_vision_available

from ..core.errors import InputError
from ..core.files import refusing

__all__ = ["check_weights", "read_config", "read_processor", "read_tokenizer", "reading"]

# What transformers and safetensors raise over files that are not what they should be, beside the usual.
MALFORMED = (AssertionError, ImportError, StrictDataclassError, SafetensorError)
SIZES = re.compile(  # what counts something in a config, under the names that architectures give it
    r"vocab_size|hidden_size|intermediate_size|num_hidden_layers|num_(attention|key_value)_heads|head_dim"
    r"|max_position_embeddings|n_(embd|layers?|heads?|positions|ctx|inner)|d_(model|ff)"
    r"|mlp_hidden_size|max_sequence_length"
)
LAYERS = re.compile(r"num_hidden_layers|n_layers?")
MOST, MOST_LAYERS = 2**31 - 1, 2000  # layers are built one after the other, before any weight is looked at
POSITIONS = re.compile(r"max_position_embeddings|max_sequence_length|n_(positions|ctx)")  # may have no weights
SPARE = 2**23  # entries that a broken config may ask for without harm
WIDTHS = ("hidden_size", "n_embd", "d_model")
NUMBERS = re.compile(r"rope_theta|\w*norm_eps(ilon)?|layer_norm_epsilon")
HARMLESS = re.compile(r"\.(attn|attention)\.(bias|masked_bias|causal_mask)$")  # masks that old GPT checkpoints carry


def reading(
    name: str, what: str = "model", remedy: str = "check the id or give a folder"
) -> AbstractContextManager[None]:
    """Say in a sentence whatever a reader trips over, see `refusing`.

    Args:
        name: as the user gave it.
        remedy: what to do where there is nothing of that name.
    """
    return refusing(lambda error: _why(name, what, remedy, error), *MALFORMED)


def _why(name: str, what: str, remedy: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code=True" in text:
        return (
            f"the {what} {name!r} brings Python code of its own, which is not run; read it, and if you trust it add "
            "--trust-remote-code (in Python: trust_remote_code=True)"
        )
    if "Unrecognized configuration class" in text or "does not recognize this architecture" in text:
        return f"the {what} {name!r} is not a causal language model that transformers knows; choose another one"
    if isinstance(error, OSError) and not os.path.isdir(os.path.expanduser(name)):  # a name may be too long
        return f"the {what} {name!r} is not in the local cache and no hub gave it; {remedy}"
    reason = f"{type(error).__name__}: {text[:200] or 'no more is said'}"
    return f"the {what} {name!r} cannot be loaded ({reason}); give one that save_pretrained has written"


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a folder; empty for a hub id.

    transformers takes some configs that count layers or heads with what is no count, and builds a model of them for
    hours, or one that writes nonsense.

    Raises:
        InputError: no object, a size in it that is none, or more weights than the files beside it can hold.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        return {}
    config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        kind = "null" if config is None else f"a {type(config).__name__}"
        raise InputError(f"{str(file)!r} holds {kind}; give the object that save_pretrained writes")
    parts = [part.stat().st_size for part in file.parent.glob("model*.safetensors")]
    _check_sizes(config, str(file), 8 * sum(parts) + SPARE if parts else None)
    return config


def _check_sizes(config: dict[str, Any], where: str, bits: int | None) -> None:
    """Refuse what counts nothing, and a matrix of more entries than there are bits stored (torch would allocate it)."""
    width = next((config[name] for name in WIDTHS if type(config.get(name)) is int), 1)
    for name, value in config.items():
        if isinstance(value, dict):
            _check_sizes(value, where, bits)
            continue
        given = [x for x in (value if isinstance(value, list) else [value]) if x is not None]  # a list has one a layer
        if NUMBERS.fullmatch(name) and not all(type(x) in (int, float) and 0 < x < math.inf for x in given):
            raise InputError(f"{where!r} has {name}={value!r}; give a number > 0")
        if not SIZES.fullmatch(name):
            continue
        most = MOST_LAYERS if LAYERS.fullmatch(name) else MOST
        if not all(type(x) is int and 0 < x <= most for x in given):
            raise InputError(f"{where!r} has {name}={value!r}; give a whole number from 1 to {most}")
        if bits is not None and not POSITIONS.fullmatch(name) and width * max(given, default=0) > bits:
            raise InputError(f"{where!r} has {name}={value!r}, for which the weights beside it are too few; mend it")


def read_tokenizer(folder: str | Path, trust_remote_code: bool = False, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, once there and back; `options` as of `from_pretrained`."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    return _tried(tokenizer)


def read_processor(
    folder: str | Path, trust_remote_code: bool = False, **options: Any
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """What makes inputs of images and text; the tokenizer where the checkpoint has nothing else, or no image can be
    read here."""
    names = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)
    has_one = any(cached_file(folder, name, _raise_exceptions_for_missing_entries=False) for name in names)
    if has_one and not is_vision_available():
        warnings.warn(f"{str(folder)!r} gets text only, as pillow is missing; `pip install pillow`", stacklevel=4)
    if not has_one or not is_vision_available():
        return read_tokenizer(folder, trust_remote_code, **options)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    _tried(processor.tokenizer)
    return processor


def _tried(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.decode(tokenizer(["a b"]).input_ids[0])  # some broken fields fail only in use
    return tokenizer


def check_weights(found: dict[str, Any], kind: str) -> None:
    """Refuse a checkpoint that does not have exactly the weights of its model.

    Args:
        found: what `from_pretrained(..., ignore_mismatched_sizes=True, output_loading_info=True)` says. Tied weights
            are none that is missing, nor are those that transformers itself leaves out.
        kind: the model's class.

    Raises:
        InputError: tensors that are missing, of another shape, or unexpected.
    """
    shapes = [f"{name} {tuple(has)} for {tuple(wants)}" for name, has, wants in found["mismatched_keys"]]
    extra = [name for name in found["unexpected_keys"] if not HARMLESS.search(name)]
    faults = {"it lacks": found["missing_keys"], "another shape has": shapes, "unknown is": extra}
    said = [f"{what} {_some(names)}" for what, names in faults.items() if names]
    if said:
        raise InputError(
            f"the weights are not those of the {kind} in config.json: {'; '.join(said)}; give a complete checkpoint"
        )


def _some(names: Collection[str], most: int = 3) -> str:
    rest = len(names) - most
    return ", ".join(sorted(names)[:most]) + (f" and {rest} more" if rest > 0 else "")
