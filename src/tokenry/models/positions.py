"""How many positions a model has, and whether there is anything beyond them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

from transformers import PreTrainedModel

from ..core.errors import InputError
from .kv_cache import forward_arguments
from .llamacpp.model import LlamaCppModel

__all__ = ["check_prompt_fits", "context_window", "fixed_positions", "position_obstacle", "stretched_positions"]

OFFSETS = (0, 2)  # rows of a table before the first position (OPT has two)


def context_window(model: PreTrainedModel) -> int | None:
    """The tokens that the model was made for; None where its config names no number."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if window == -1 else window  # XLNet's word for any number


def fixed_positions(model: PreTrainedModel) -> int | None:
    """The context window of a model that looks its positions up in a table, or has room for no more, and so has none
    beyond; else None."""
    window = context_window(model)
    if window is None or isinstance(model, LlamaCppModel):
        return window
    tables = chain(model.named_parameters(), model.named_buffers())
    sizes = {t.shape[0] for name, t in tables if t.dim() == 2 and ("wpe" in name or "position" in name)}
    return window if any(window + offset in sizes for offset in OFFSETS) else None


def check_prompt_fits(model: PreTrainedModel, length: int, new: int = 1) -> None:
    """Refuse a prompt of `length` tokens that leaves no position for another one, or for `new` ones in a table."""
    window = context_window(model)
    if window is not None and length >= window:
        raise InputError(f"the prompt has {length} tokens, the model's context window {window}; shorten the prompt")
    fixed = fixed_positions(model)
    if fixed is not None and length + new > fixed:
        raise InputError(
            f"the prompt has {length} tokens and with {new} new ones more than the model's {fixed} positions; shorten "
            "it"
        )


def stretched_positions(model: PreTrainedModel) -> bool:
    """Whether the rotations of all rows depend on how long the longest one is."""
    settings = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = [one.get("rope_type", "") for one in (settings, *settings.values()) if isinstance(one, Mapping)]
    return any("dynamic" in kind or kind == "longrope" for kind in kinds)


def position_obstacle(model: PreTrainedModel) -> str | None:
    """Why a token's position is the number of its column, whatever one says; None if it is not."""
    name, config = type(model).__name__, model.config.get_text_config()
    if "position_ids" not in forward_arguments(model):
        return f"{name} takes no position_ids"
    if getattr(config, "alibi", False):
        return f"{name} has ALiBi, which counts columns"
    if "local" in getattr(config, "attention_layers", ()):
        return f"{name} has local attention, which counts columns"
    if hasattr(config, "num_image_with_embedding"):
        return f"{name} widens every mask by the columns of an image"
    return None
