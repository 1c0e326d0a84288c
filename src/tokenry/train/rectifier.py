"""Training a rectifier: the value of dead ends, learned from texts of which it is known whether they ended undesired.

Paper: Systematic Rectification of Language Models via Dead-end Analysis, arXiv 2302.14003. Offline SARSA: the value of
a token is pulled toward the value of the token that came next in the text, and that of the last token toward the
reward. The texts come from the model that will be rectified, so that the values are its own risks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ..core.errors import InputError
from ..core.fields import Batch, Layers, Passes, Portion, Rate, Seed, Times
from ..core.files import is_number, read_records
from ..core.schemas import Fields, checked
from ..learned.dead_end_values import DeadEndValueModel
from ..models.batch import right_padded
from .contract import TrainMethod, report_progress
from .preference.pairs import TokenId

__all__ = [
    "Rectifier",
    "RectifierCollator",
    "RectifierConfig",
    "RectifierTrainer",
    "check_episodes",
    "keep_extremes",
    "read_episodes",
    "sarsa_loss",
]

Episode = dict[str, Any]  # prompt_ids, continuation_ids, reward (of the whole, or one for each continuation token)


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


@dataclass
class RectifierCollator:
    """Right-pads episodes; longer ones lose the beginning of their prompt.

    Returns `input_ids`, `attention_mask` and `rewards` (batch, time).
    """

    pad_token_id: int
    max_length: int = 1024

    def __call__(self, episodes: Sequence[Episode]) -> dict[str, Tensor]:
        rows = [[*e["prompt_ids"], *e["continuation_ids"]][-self.max_length :] for e in episodes]
        ids, mask = right_padded(rows, self.pad_token_id)
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "rewards": torch.tensor([self._rewards(e, len(row), ids.shape[1]) for e, row in zip(episodes, rows)]),
        }

    @staticmethod
    def _rewards(episode: Episode, length: int, width: int) -> list[float]:
        """A number for each token; one reward for the whole comes with its last token."""
        given = episode["reward"] if isinstance(episode["reward"], list | tuple) else [episode["reward"]]
        given = [float(r) for r in given][-length:]
        return [0.0] * (length - len(given)) + given + [0.0] * (width - length)


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
        InputError: no tokenizer, no episodes, or some that `check_episodes` refuses.
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
            data_collator = RectifierCollator(pad or 0, args.max_length)  # masked, so any token will do
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


# --- the method ----------------------------------------------------------------------------------------------------


class Rectifier(TrainMethod):
    """Learn from a model's own texts how likely each next token leads to an undesired end."""

    slug: ClassVar[str] = "rectifier"
    title: ClassVar[str] = "Rectifier"
    paper: ClassVar[str] = (
        "Systematic Rectification of Language Models via Dead-end Analysis, ICLR 2023, arXiv 2302.14003"
    )
    claim: ClassVar[str] = "A small model learns from labeled texts which next tokens lead to an undesired end."
    examples: ClassVar[str] = "episodes"
    measures: ClassVar[dict[str, str]] = {
        "undesired": "mean of -reward, what the risk should be",
        "risk": "mean risk at the first token",
        "error_first": "squared error of the risk at the first token",
        "error_middle": "at the middle token",
        "error_last": "at the last token",
    }
    next_step: ClassVar[str] = (
        "tokenry decode --method rectification -o rectifier={output} --model {model} --raw PROMPT"
    )

    layers: Layers = Field(4, description="blocks of the trunk, a new Llama with 4 heads")
    width: int = Field(192, ge=8, le=2**14, multiple_of=8, description="its width, a multiple of 8")
    hidden_mult: int = Field(2, ge=1, le=64, description="width of the head's hidden layer, in widths of the trunk")
    gamma: Portion = Field(1.0, description="discount from one token to the next")
    target_update: Portion = Field(0.1, description="share of the head that the averaged head takes over")
    learning_rate: Rate = Field(3e-4, description="highest learning rate")
    warmup_steps: Times = Field(500, description="steps until it is reached")
    batch_size: Batch = Field(64, description="episodes in a step")
    epochs: Passes = Field(3.0, description="passes over the episodes")
    max_length: int = Field(1024, ge=2, le=2**20, description="tokens of an episode kept, from the right")
    seed: Seed = Field(0, description="of the first weights and of the order")

    def read(self, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[Episode]:
        """The shuffled episodes in a file, see `read_episodes`."""
        episodes = read_episodes(path, tokenizer)
        random.Random(self.seed).shuffle(episodes)
        return episodes

    def untrained(self, model: PreTrainedModel) -> DeadEndValueModel:
        """A new rectifier for the vocabulary of a language model, on its device."""
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=model.config.get_text_config().vocab_size,
            hidden_size=self.width,
            intermediate_size=8 * self.width // 3,
            num_hidden_layers=self.layers,
            num_attention_heads=4,
            max_position_embeddings=max(self.max_length, 2048),
        )
        return DeadEndValueModel(LlamaModel(config), self.hidden_mult).to(model.device)

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        episodes: Sequence[Episode],
        output_dir: str | Path,
        progress: Callable[..., None] | None = None,
    ) -> RectifierTrainer:
        config = RectifierConfig(
            str(output_dir),
            gamma=self.gamma,
            target_update=self.target_update,
            max_length=self.max_length,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            per_device_train_batch_size=self.batch_size,
            num_train_epochs=self.epochs,
            seed=self.seed,
            use_cpu=model.device.type == "cpu",
            disable_tqdm=progress is not None,
        )
        trainer = RectifierTrainer(self.untrained(model), config, episodes, processing_class=tokenizer)
        if progress:
            report_progress(trainer, progress)
        return trainer

    @torch.no_grad()
    def score(self, trainer: RectifierTrainer, episodes: Sequence[Episode]) -> dict[str, float]:
        """How well the risk of the first, middle and last continuation token foretells what is still to come."""
        model, found = trainer.model.eval(), []
        for start in range(0, len(episodes), self.batch_size):
            part = episodes[start : start + self.batch_size]
            batch = {name: value.to(model.device) for name, value in trainer.data_collator(part).items()}
            q = model(batch["input_ids"], batch["attention_mask"]).q[:, :-1]
            risk = -q.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1).clamp(-1, 0)
            to_come = -batch["rewards"].flip(1).cumsum(1).flip(1)[:, 1:]
            last = batch["attention_mask"].sum(1) - 2  # the transition to the last token
            lengths = torch.tensor([len(e["continuation_ids"]) for e in part], device=last.device)
            first = (last + 1 - lengths).clamp_min(0)
            places = torch.stack([first, (first + last + 1) // 2, last], 1)
            risk, to_come = risk.gather(1, places), to_come.gather(1, places)
            found.append(torch.cat([to_come[:, :1], risk[:, :1], (risk - to_come) ** 2], 1))
        return dict(zip(self.measures, torch.cat(found).mean(0).tolist()))

    def save(self, trainer: RectifierTrainer, folder: Path) -> None:
        trainer.model.eval().save(folder)
