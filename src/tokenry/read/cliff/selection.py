"""Cliff-as-a-Judge: training data chosen by how far the model falls on it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

from ...core.errors import InputError
from ...learned.linear_probe import LinearProbe
from ...models.load import Loaded
from .curve import Plateau, cliff_score, place_of
from .examples import MARKERS, text_of, traced

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["select_by_cliff"]


def select_by_cliff(
    dataset: Dataset,
    loaded: Loaded,
    probe: LinearProbe,
    fraction: float = 0.017,
    *,
    refusal: str,
    plateau: Plateau = "mean_think",
    least: float = 0.5,
) -> Dataset:
    """The share of the examples with the highest cliffs, with the model's own thinking and a refusal as the answer.

    Args:
        dataset: columns `prompt`, of harmful prompts, and `thinking`, the model's own.
        loaded: model and tokenizer.
        fraction: of the examples, rounded up; fewer where less of them have a plateau of `least`.
        refusal: the answer that is to be learned.
        least: plateau from which the thinking counts as one that doubts.

    Returns:
        The dataset with columns plateau, final, cliff, highest cliffs first, and prompt and completion as `SFTTrainer`
        takes them: `prompt` as the text of the template.

    Raises:
        InputError: a fraction outside (0, 1], missing columns, no refusal, a probe of another model.
    """
    model, tokenizer = loaded
    if not 0 < fraction <= 1 or not refusal.strip():
        raise InputError(f"fraction={fraction}, refusal={refusal!r} is not allowed; give (0, 1] and some text")
    if not {"prompt", "thinking"} <= set(dataset.column_names) or not len(dataset):
        raise InputError(f"the dataset has {len(dataset)} rows of {dataset.column_names}; give prompt and thinking")
    probe.check(model)
    pairs = zip(cast(list[str], dataset["prompt"]), cast(list[str], dataset["thinking"]))
    texts = [text_of(tokenizer, prompt, thinking) for prompt, thinking in pairs]
    found = [
        cliff_score(probe.curve(trace), *place_of(trace), plateau)
        for trace in traced(model, tokenizer, texts, probe.layer)
    ]
    doubting = [i for i, one in enumerate(found) if one.plateau >= least]
    chosen = sorted(doubting, key=lambda i: -found[i].cliff)[: math.ceil(fraction * len(found))]
    kept = dataset.select(chosen)
    for name in ("plateau", "final", "cliff"):
        kept = kept.add_column(name, [getattr(found[i], name) for i in chosen])
    answered = {i: _split(texts[i]) for i in chosen}
    end = tokenizer.eos_token or ""
    kept = kept.remove_columns([name for name in ("prompt", "completion") if name in kept.column_names])
    kept = kept.add_column("prompt", [answered[i][0] for i in chosen])
    return kept.add_column("completion", [f"{answered[i][1]}{refusal.strip()}{end}" for i in chosen])


def _split(text: str) -> tuple[str, str]:
    """Up to the opening marker of the thinking, and what the model writes from there on."""
    end = text.rindex(MARKERS[0]) + len(MARKERS[0])
    return text[:end], text[end:]
