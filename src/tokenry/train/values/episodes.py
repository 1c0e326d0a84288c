"""Episodes: texts of which it is known whether they ended undesired."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator
from transformers import PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.files import is_number, read_records
from ...core.schemas import Fields, checked
from ..preference.pairs import TokenId

__all__ = ["Episode", "check_episodes", "keep_extremes", "read_episodes"]

Episode = dict[str, Any]  # prompt_ids, continuation_ids, reward (of the whole, or one for each continuation token)


def read_episodes(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[Episode]:
    """The episodes in a file, a JSON object a line: prompt, continuation (both text, or ids under the names prompt_ids
    and continuation_ids) and reward.

    A text is encoded as it stands: a mark such as `<eos>` that ended it, and a chat template, must be written out.
    """
    return read_records(path, "episodes", REMEDY, lambda row, where: _episode(row, where, tokenizer))


REMEDY = "write lines with prompt, continuation (texts) and reward, or with prompt_ids, continuation_ids and reward"


def _check_reward(reward: Any) -> Any:
    each = reward if isinstance(reward, list) else [reward]
    if not all(is_number(r) and -1 <= r <= 0 for r in each):
        raise ValueError("it should be a number in [-1, 0], or a list of one for each token")
    return reward


class TextEpisode(Fields):
    """An episode in words."""

    prompt: str
    continuation: str
    reward: Annotated[Any, AfterValidator(_check_reward)]


class IdEpisode(Fields):
    """An episode in tokens."""

    prompt_ids: list[TokenId]
    continuation_ids: list[TokenId]
    reward: Annotated[Any, AfterValidator(_check_reward)]


def _episode(row: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> Episode:
    if "prompt_ids" in row:
        return checked(IdEpisode, row, where, REMEDY).model_dump(include=set(IdEpisode.model_fields))
    found = checked(TextEpisode, row, f"{where} with the keys {sorted(row)}", REMEDY)
    prompt = tokenizer.encode(found.prompt)
    continuation = tokenizer.encode(found.continuation, add_special_tokens=False)
    return {"prompt_ids": prompt, "continuation_ids": continuation, "reward": found.reward}


def check_episodes(episodes: Sequence[Episode], vocabulary: int) -> None:
    """Refuse episodes that cannot be trained on, naming the first one."""
    for number, episode in enumerate(episodes):
        continuation, reward = episode["continuation_ids"], episode["reward"]
        ids = [*episode["prompt_ids"], *continuation]
        if not len(continuation) or len(ids) < 2:
            raise InputError(f"episode {number} has an empty continuation or no prompt; leave it out")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise InputError(
                f"episode {number} has ids from {min(ids)} to {max(ids)}, the rectifier has {vocabulary} tokens; use "
                "the tokenizer that it was built with"
            )
        each = reward if isinstance(reward, list | tuple) else [reward]
        if each is reward and len(reward) != len(continuation):
            raise InputError(
                f"episode {number} has {len(reward)} rewards for {len(continuation)} continuation tokens; give one for "
                "each, or one number for the whole"
            )
        if not all(-1 <= r <= 0 for r in each):
            raise InputError(f"episode {number} has the reward {reward}; give numbers in [-1, 0]")


def keep_extremes(
    groups: Sequence[Sequence[tuple[Episode, float]]], threshold: float = 0.5, drop: float = 0.5, seed: int = 0
) -> list[Episode]:
    """The published choice: of every prompt's continuations only the least and the most undesired one.

    It makes training short, and the values no longer the model's risk; train on all continuations where that matters.

    Args:
        groups: for every prompt its episodes (their rewards are set here), each with the probability of being
            undesired.
        threshold: undesired from here on.
        drop: share of the prompts without any undesired continuation that is left out.
    """
    rng, kept = random.Random(seed), []
    for group in groups:
        ordered = sorted(group, key=lambda pair: pair[1])
        if ordered[-1][1] <= threshold and rng.random() < drop:
            continue
        chosen = ordered[:1] + ordered[-1:] if len(ordered) > 1 else ordered
        kept += [{**episode, "reward": -1.0 if p >= threshold else 0.0} for episode, p in chosen]
    return kept
