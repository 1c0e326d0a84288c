"""A model that llama.cpp runs, as the rest of tokenry sees it: its configuration and its ids, no weights.

`generate` of transformers prepares settings, logits processors and stopping criteria for it as for any other model; the
decode loop then asks `tokenry.decode.engines` for logits. Nothing else can be asked of it.
"""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from ...core.errors import InputError
from .bindings import F16, F32, library

__all__ = ["LlamaCppModel", "Weights", "open_gguf"]

WINDOW = 4096  # positions of a model whose file names no number
ALL_F32 = "0"  # general.file_type


class Weights:
    """A GGUF file that llama.cpp has opened.

    Attributes:
        pointer: llama.cpp's model, which is freed with this object.
        vocabulary: how many tokens its logits have.
        ends: tokens that end a text.
        precision: of keys and values: F32 where the weights are, for the numbers of transformers; else half of that.
        threads: how many a forward takes.
    """

    def __init__(self, file: Path, threads: int) -> None:
        self.file, self.threads, self.library = file, threads, library()
        ffi, lib = self.library.ffi, self.library.lib
        self.library.warnings.clear()
        pointer = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        if pointer == ffi.NULL:
            raise InputError(
                f"llama.cpp cannot open {str(file)!r} ({'; '.join(self.library.warnings) or 'no more is said'}); "
                "download or convert it again"
            )
        self.pointer = pointer
        weakref.finalize(self, lib.llama_model_free, pointer)
        if lib.llama_model_is_recurrent(pointer) or lib.llama_model_is_hybrid(pointer):
            raise InputError(
                f"{str(file)!r} has recurrent layers, from which llama.cpp cannot take single tokens back; load the "
                "model with transformers, from a folder"
            )
        vocabulary = lib.llama_model_get_vocab(pointer)
        self.vocabulary: int = lib.llama_vocab_n_tokens(vocabulary)
        self.ends = [token for token in range(self.vocabulary) if lib.llama_vocab_is_eog(vocabulary, token)]
        self.precision = F32 if self._noted("general.file_type") == ALL_F32 else F16

    def _noted(self, key: str) -> str:
        """What the file says under `key`."""
        found = self.library.ffi.new("char[64]")
        self.library.lib.llama_model_meta_val_str(self.pointer, key.encode(), found, len(found))
        return self.library.ffi.string(found).decode()


class LlamaCppModel(PreTrainedModel, GenerationMixin):
    """A model whose weights llama.cpp holds, see `tokenry.load("model.gguf")`.

    Attributes:
        weights: the open file.
        config: the configuration that transformers reads from it; `max_position_embeddings` is where texts end.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # nobody asks llama.cpp for another one

    def __init__(self, config: PreTrainedConfig, weights: Weights) -> None:
        super().__init__(config)
        self.weights = weights

    @property
    def device(self) -> torch.device:
        """Where ids and logits are."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the logits."""
        return torch.float32

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> NoReturn:
        raise self.refusal("its own forward")

    def get_input_embeddings(self) -> NoReturn:
        raise self.refusal("its embeddings")

    def get_output_embeddings(self) -> NoReturn:
        raise self.refusal("its output head")

    def refusal(self, what: str) -> InputError:
        """Why something that only a torch model has cannot be had."""
        return InputError(
            f"llama.cpp runs {self.weights.file.name!r} and gives logits alone, so {what} cannot be used; load the "
            "model with transformers (engine='transformers'), from a folder or hub id"
        )


def open_gguf(file: Path, folder: Path, context: int | None = None, threads: int | None = None) -> LlamaCppModel:
    """A GGUF file as a model.

    Args:
        folder: where its configuration is, and perhaps its settings for generation.
        context: the most tokens of a text; default: what the model was made for.
        threads: of a forward; default: as many as torch uses.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    window = getattr(config, "max_position_embeddings", None) or WINDOW
    if context is not None and not 1 < context <= window:
        raise InputError(f"context={context} is not allowed; {file.name!r} has 2 to {window} positions")
    if threads is not None and threads < 1:
        raise InputError(f"threads={threads} is not allowed; give a number >= 1")
    weights = Weights(file, threads or torch.get_num_threads())
    config.max_position_embeddings, config.vocab_size = context or window, weights.vocabulary
    config._name_or_path = str(folder)
    model = LlamaCppModel(config, weights)
    own = folder / GENERATION_CONFIG_NAME
    model.generation_config = (
        GenerationConfig.from_dict(json.loads(own.read_text(encoding="utf-8")))
        if own.is_file()
        else GenerationConfig(
            bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id, eos_token_id=weights.ends or None
        )
    )
    return model.eval()
