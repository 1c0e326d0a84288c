"""What scores of solutions are for: the best of n, a weighted vote, preference pairs.

CRew-DPO (arXiv 2510.13501) pairs right with wrong solutions and trains on the pairs whose scores differ most.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ...core.errors import InputError
from ...text.answers import normalise_answer
from .samples import Judged

if TYPE_CHECKING:
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig


__all__ = [
    "Vote",
    "best_of_n",
    "build_crew_pairs",
    "crew_dpo_config",
    "lowest_correct",
    "weighted_vote",
]


class Vote(NamedTuple):
    """The answer that won, normalized, and its share of all weight."""

    answer: str
    share: float


def best_of_n(samples: Sequence[Judged]) -> Judged | None:
    """The sample of the highest score, the first of equals; None if no sample has an answer.

    Raises:
        InputError: fewer than 2 samples, or samples of several prompts.
    """
    _check_choice(samples)
    return max((s for s in samples if s.score is not None), key=_score, default=None)


def weighted_vote(samples: Sequence[Judged]) -> Vote | None:
    """The answer with the largest sum of scores, the first seen of equals; None if no sample has an answer.

    With equal scores this is self-consistency.

    Raises:
        InputError: as `best_of_n`.
    """
    _check_choice(samples)
    weights: dict[str, float] = {}
    for sample in samples:
        if sample.score is not None:
            answer = normalise_answer(cast(str, sample.answer))  # what has a score has an answer
            weights[answer] = weights.get(answer, 0.0) + sample.score
    if not weights:
        return None
    winner, total = max(weights, key=weights.__getitem__), sum(weights.values())
    return Vote(winner, weights[winner] / total if total else 1 / len(weights))


def _score(sample: Judged) -> float:
    """The score of a sample that has one."""
    return cast(float, sample.score)


def _check_choice(samples: Sequence[Judged]) -> None:
    prompts = {sample.prompt for sample in samples}
    if len(samples) < 2:
        raise InputError(f"there is nothing to choose among {len(samples)} samples; give at least 2 of one prompt")
    if len(prompts) > 1:
        raise InputError(f"these samples answer {len(prompts)} prompts; choose among the samples of one prompt")


def lowest_correct(samples: Iterable[Judged]) -> list[Judged]:
    """For fine-tuning: the right solution of the lowest score for each prompt, which the paper finds to teach most."""
    groups = _by_prompt(samples).values()
    right = [[s for s in group if s.correct and s.score is not None] for group in groups]
    return [min(group, key=_score) for group in right if group]


def build_crew_pairs(samples: Iterable[Judged], top_k: int = 10, min_gap: float | None = None) -> Dataset:
    """Preference pairs of CRew-DPO: for each prompt the (right, wrong) pairs with the largest difference of scores.

    Args:
        samples: judged solutions of any number of prompts; the paper draws 30 a prompt at temperature 1. Those without
            an answer are left out.
        top_k: pairs per prompt; the paper takes 10 (MATH) or 15 (GSM8K).
        min_gap: smallest difference; 0 drops pairs whose wrong answer is the surer one, None keeps them.

    Returns:
        Columns prompt, chosen, rejected, gap, as `trl.DPOTrainer` takes them. Its `info.description` says how many
        prompts gave no pair.

    Raises:
        InputError: top_k < 1, samples that were judged without a gold answer, no pair at all, or no `datasets`.
    """
    if top_k < 1:
        raise InputError(f"top_k={top_k} keeps no pair; give a number >= 1")
    datasets = _train_package("datasets")
    groups = _by_prompt(samples)
    found = [_pairs(group, top_k, min_gap) for group in groups.values()]
    rows = [row for group in found for row in group]
    if not rows:
        raise InputError(
            f"none of the {len(groups)} prompts has a right and a wrong solution to compare; draw more samples"
            + ("" if min_gap is None else f", or lower min_gap={min_gap}")
        )
    dataset = datasets.Dataset.from_list(rows)
    empty = sum(not group for group in found)
    dataset.info.description = f"{empty} of {len(groups)} prompts gave no pair ({empty / len(groups):.0%})"
    return dataset


def _by_prompt(samples: Iterable[Judged]) -> dict[str, list[Judged]]:
    groups: dict[str, list[Judged]] = {}
    for sample in samples:
        if sample.correct is None:
            raise InputError("a sample is neither right nor wrong; give its gold answer: judge(..., gold=[...])")
        groups.setdefault(sample.prompt, []).append(sample)
    return groups


def _pairs(samples: Sequence[Judged], top_k: int, min_gap: float | None) -> list[dict[str, Any]]:
    """The pairs of one prompt, largest gap first."""
    known = [s for s in samples if s.score is not None]
    pairs = [
        {"prompt": good.prompt, "chosen": good.solution, "rejected": bad.solution, "gap": _score(good) - _score(bad)}
        for good in known
        for bad in known
        if good.correct and not bad.correct
    ]
    kept = [pair for pair in pairs if min_gap is None or pair["gap"] >= min_gap]
    return sorted(kept, key=lambda pair: -pair["gap"])[:top_k]


def crew_dpo_config(
    output_dir: str, development: bool = True, per_device_train_batch_size: int = 8, **options: Any
) -> DPOConfig:
    """The paper's training: beta 0.3, learning rate 5e-7, 128 pairs a step on one device, 2 epochs.

    Args:
        development: evaluate every 50 steps and keep the best; the trainer then needs an `eval_dataset`. In the paper
            the second round lost accuracy, so this is worth its price.
        options: anything `DPOConfig` takes; replaces the values above.

    Raises:
        InputError: a batch size that does not divide 128, or no `trl`.
    """
    if per_device_train_batch_size < 1 or 128 % per_device_train_batch_size:
        raise InputError(f"per_device_train_batch_size={per_device_train_batch_size} does not divide 128; give 8 or 16")
    checks = {"eval_strategy": "steps", "eval_steps": 50, "load_best_model_at_end": True} if development else {}
    paper = {
        "beta": 0.3,
        "learning_rate": 5e-7,
        "num_train_epochs": 2,
        "per_device_train_batch_size": per_device_train_batch_size,
        "gradient_accumulation_steps": 128 // per_device_train_batch_size,
        "save_steps": 50,
    }
    return _train_package("trl").DPOConfig(output_dir, **{**paper, **checks, **options})


def _train_package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"CRew-DPO needs the package {name}; run `pip install tokenry[train]`") from None
