"""Training a rectifier: the value of dead ends, learnt from texts of which it is known whether they ended undesired.

Paper: Systematic Rectification of Language Models via Dead-end Analysis, arXiv 2302.14003. Offline SARSA: the value of
a token is pulled towards the value of the token that came next in the text, and that of the last token towards the
reward. The texts come from the model that will be rectified, so that the values are its own risks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from ..dead_end import DeadEndValueModel
from ..errors import InputError

__all__ = ["RectifierCollator", "RectifierConfig", "RectifierTrainer", "check_episodes", "keep_extremes", "sarsa_loss"]

Episode = dict[str, Any]  # prompt_ids, continuation_ids, reward


# --- the loss ------------------------------------------------------------------------------------------------------


def sarsa_loss(
    q: Tensor,
    target_q: Tensor,
    input_ids: Tensor,
    rewards: Tensor,
    attention_mask: Tensor,
    gamma: float = 1.0,
    q_min: float = -1.0,
    q_max: float = 0.0,
) -> Tensor:
    """Squared error of Q(prefix, next token) to what came after it (arXiv 2302.14003).

    The target is the reward of the next token plus gamma times the averaged head's value of the token after that, and
    the reward alone for the last token; it is clamped and carries no gradient. The sum is divided by the number of
    tokens that are no padding, as in the official code (one more per text than there are transitions).

    Args:
        q, target_q: (batch, time, vocab), after each token, for every next one.
        input_ids, attention_mask: (batch, time), padded on the right.
        rewards: (batch,) at the end of each text, or (batch, time) for each token; in [-1, 0].

    Raises:
        InputError: a text of fewer than two tokens, padding elsewhere, or a reward outside [-1, 0].
    """
    mask = attention_mask.bool()
    lengths = mask.sum(1)
    if int(lengths.min()) < 2:
        raise InputError("a text has fewer than two tokens, so no token follows another; leave it out")
    if bool((~mask[:, :-1] & mask[:, 1:]).any()):
        raise InputError("a row is padded on the left or inside; pad on the right")
    actions, taken = input_ids[:, 1:, None], mask[:, 1:]  # the last real token is an action, even where it is padding
    value = q[:, :-1].gather(-1, actions).squeeze(-1)
    with torch.no_grad():
        after = target_q[:, :-1].gather(-1, actions).squeeze(-1)[:, 1:] * taken[:, 1:]
        after = nn.functional.pad(after, (0, 1))  # nothing comes after the last token
        target = (_each_token(rewards, lengths, mask) + gamma * after).clamp(q_min, q_max)
    return ((value - target).square() * taken).sum() / mask.sum()


def _each_token(rewards: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
    """Rewards of the tokens from the second on, (batch, time - 1)."""
    if bool(((rewards < -1) | (rewards > 0) | rewards.isnan()).any()):
        raise InputError(
            f"rewards from {float(rewards.min())} to {float(rewards.max())} are not allowed; give numbers in [-1, 0]"
        )
    if rewards.dim() == 1:
        last = torch.arange(1, mask.shape[1], device=mask.device) == lengths[:, None] - 1
        return last * rewards[:, None]
    return rewards[:, 1:] * mask[:, 1:]


# --- episodes ------------------------------------------------------------------------------------------------------


def check_episodes(episodes: Sequence[Episode], vocabulary: int) -> None:
    """Refuse episodes that cannot be trained on."""
    for number, episode in enumerate(episodes):
        ids = [*episode["prompt_ids"], *episode["continuation_ids"]]
        if not len(episode["continuation_ids"]) or len(ids) < 2:
            raise InputError(f"episode {number} has an empty continuation or no prompt; leave it out")
        if min(ids) < 0 or max(ids) >= vocabulary:
            raise InputError(
                f"episode {number} has ids from {min(ids)} to {max(ids)}, the rectifier has {vocabulary} tokens; use "
                "the tokenizer that it was built with"
            )
        if not -1 <= episode["reward"] <= 0:
            raise InputError(f"episode {number} has the reward {episode['reward']}; give a number in [-1, 0]")


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


@dataclass
class RectifierCollator:
    """Right-pads episodes; longer ones lose the beginning of their prompt.

    Returns `input_ids`, `attention_mask` (batch, time) and `rewards` (batch,).
    """

    pad_token_id: int
    max_length: int = 1024

    def __call__(self, episodes: Sequence[Episode]) -> dict[str, Tensor]:
        rows = [[*e["prompt_ids"], *e["continuation_ids"]][-self.max_length :] for e in episodes]
        width = max(map(len, rows))
        return {
            "input_ids": torch.tensor([row + [self.pad_token_id] * (width - len(row)) for row in rows]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
            "rewards": torch.tensor([float(e["reward"]) for e in episodes]),
        }


# --- the trainer ---------------------------------------------------------------------------------------------------


@dataclass
class RectifierConfig(TrainingArguments):
    """`TrainingArguments` with the terms of `sarsa_loss` and the published schedule."""

    gamma: float = field(default=1.0, metadata={"help": "discount from one token to the next"})
    q_min: float = field(default=-1.0, metadata={"help": "smallest target"})
    q_max: float = field(default=0.0, metadata={"help": "largest target"})
    target_update: float = field(default=0.1, metadata={"help": "share of the head that the averaged head takes over"})
    max_length: int = field(default=1024, metadata={"help": "tokens of an episode kept, from the right"})
    learning_rate: float = 3e-4
    num_train_epochs: float = 3.0
    per_device_train_batch_size: int = 64
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 500
    weight_decay: float = 0.0
    save_strategy: str = "no"
    report_to: str = "none"
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gamma", "target_update"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)} is not allowed; give a number in (0, 1]")
        if self.q_min >= self.q_max:
            raise InputError(f"q_min={self.q_min} is not below q_max={self.q_max}; give [-1, 0]")


class RectifierTrainer(Trainer):
    """A `transformers.Trainer` for `DeadEndValueModel` on episodes (arXiv 2302.14003).

    Args:
        model: is bound to the tokenizer of `processing_class`.
        train_dataset, eval_dataset: episodes with prompt_ids, continuation_ids and reward (-1 for a text that ended
            undesired, 0 for another, or between).

    Raises:
        InputError: no tokenizer, one without a pad token, or episodes that `check_episodes` refuses.
    """

    def __init__(
        self,
        model: DeadEndValueModel,
        args: RectifierConfig,
        train_dataset: Sequence[Episode],
        eval_dataset: Sequence[Episode] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: RectifierCollator | None = None,
        **kwargs: Any,
    ) -> None:
        if processing_class is None:
            raise InputError("a rectifier is bound to a tokenizer; pass processing_class=tokenizer")
        if not len(train_dataset):
            raise InputError("there are no episodes to train on; sample some continuations")
        for episodes in (train_dataset, eval_dataset or ()):
            check_episodes(episodes, model.vocab_size)
        model.bind(processing_class)
        if data_collator is None:
            pad = processing_class.pad_token_id
            data_collator = RectifierCollator(
                0 if pad is None else pad, args.max_length
            )  # masked, so any token will do
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class=processing_class, **kwargs
        )
        self.model_accepts_loss_kwargs = False  # the loss is a mean of its own, whatever the accumulation
        self.add_callback(_AverageHead())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        values = model(inputs["input_ids"], inputs["attention_mask"])
        terms = {name: getattr(self.args, name) for name in ("gamma", "q_min", "q_max")}
        loss = sarsa_loss(*values, inputs["input_ids"], inputs["rewards"], inputs["attention_mask"], **terms)
        return (loss, values) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None


class _AverageHead(TrainerCallback):
    """Moves the averaged head after every optimiser step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        model.update_target(args.target_update)
