"""Training a rectifier: the value of dead ends, learned from texts of which it is known whether they ended undesired.

Paper: Systematic Rectification of Language Models via Dead-end Analysis, arXiv 2302.14003. Offline SARSA: the value of
a token is pulled toward the value of the token that came next in the text, and that of the last token toward the
reward. The texts come from the model that will be rectified, so that the values are its own risks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from transformers import LlamaConfig, LlamaModel, PreTrainedModel, PreTrainedTokenizerBase

from ..core.fields import Batch, Layers, Passes, Portion, Rate, Seed, Times
from ..core.progress import Progress
from ..learned.dead_end_values import DeadEndValueModel
from .contract import TrainMethod, report_progress
from .values.episodes import Episode, read_episodes
from .values.evaluation import risk_errors
from .values.trainer import RectifierConfig, RectifierTrainer

__all__ = ["Rectifier"]


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

    layers: Layers = Field(default=4, description="blocks of the trunk, a new Llama with 4 heads")
    width: int = Field(default=192, ge=8, le=2**14, multiple_of=8, description="its width, a multiple of 8")
    hidden_mult: int = Field(
        default=2, ge=1, le=64, description="width of the head's hidden layer, in widths of the trunk"
    )
    gamma: Portion = Field(default=1.0, description="discount from one token to the next")
    target_update: Portion = Field(default=0.1, description="share of the head that the averaged head takes over")
    learning_rate: Rate = Field(default=3e-4, description="highest learning rate")
    warmup_steps: Times = Field(default=500, description="steps until it is reached")
    batch_size: Batch = Field(default=64, description="episodes in a step")
    epochs: Passes = Field(default=3.0, description="passes over the episodes")
    max_length: int = Field(default=1024, ge=2, le=2**20, description="tokens of an episode kept, from the right")
    seed: Seed = Field(default=0, description="of the first weights and of the order")

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
        progress: Progress | None = None,
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

    def score(self, trainer: RectifierTrainer, episodes: Sequence[Episode]) -> dict[str, float]:
        """How well the risk of the first, middle and last continuation token foretells what is still to come."""
        found = risk_errors(trainer.model.eval(), episodes, trainer.data_collator, self.batch_size)
        return dict(zip(self.measures, found.mean(0).tolist()))

    def save(self, trainer: RectifierTrainer, folder: Path) -> None:
        trainer.model.eval().save(folder)
