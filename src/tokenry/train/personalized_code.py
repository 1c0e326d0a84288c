"""Personalized code models: tune a model to one software project, in ways of falling cost.

Paper: Exploring and Evaluating Personalized Models for Code Generation, ESEC/FSE 2022, arXiv 2208.13928. Its ways are
all weights ("custom"), embeddings with the output layer, the last block, and a learned prefix; LoRA stands beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.fields import Batch, Layers, Passes, Rate, Seed, Tokens, Width
from ..core.progress import Progress
from .contract import TrainMethod, report_progress
from .projects.deltas import ProjectDelta
from .projects.files import SourceFile, read_project
from .projects.trainer import PersonalConfig, PersonalizedTrainer, mean_loss
from .projects.ways import RANDOM_PREFIX_RATE, RATES, WAYS, Tuning, report

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["PersonalizedCode"]


class PersonalizedCode(TrainMethod):
    """Tune a model to the code of one project and keep only what the project needs."""

    slug: ClassVar[str] = "personalized-code"
    title: ClassVar[str] = "Personalized code models"
    paper: ClassVar[str] = (
        "Exploring and Evaluating Personalized Models for Code Generation, ESEC/FSE 2022, arXiv 2208.13928"
    )
    claim: ClassVar[str] = (
        "A model tuned to one software project foretells its code better; ways that train fewer weights cost less "
        "computation and storage, and gain less."
    )
    caution: ClassVar[str] = (
        "Most of a small gain is about the language, not about the project: measure another one with --control."
    )
    examples: ClassVar[str] = "files"
    data: ClassVar[str] = "the folder of a software project"
    takes_folder: ClassVar[bool] = True
    measures: ClassVar[dict[str, str]] = {
        "loss": "nats per token",
        "exact_match": "share of lines completed exactly",
    }
    costs_named: ClassVar[tuple[str, ...]] = ("flops", "trained_weights", "bytes")
    next_step: ClassVar[str] = "tokenry.train.load_delta(model, {output!r})"

    way: Literal["custom", "embeddings", "last_block", "prefix", "lora", "all"] = Field(
        default="custom", description="what is trained; all: each of them, from the same model"
    )
    num_virtual_tokens: Tokens = Field(default=20, description="tokens of a prefix")
    prefix_init: Literal["text", "random"] = Field(default="text", description="what a prefix begins as")
    last_n_blocks: Layers = Field(default=1, description="blocks of last_block, from the top")
    rank: Width = Field(default=16, description="rank of LoRA, and its alpha")
    learning_rate: Rate | None = Field(
        default=None, description="none: " + ", ".join(f"{way} {rate:g}" for way, rate in RATES.items())
    )
    window: int = Field(default=512, ge=16, le=2**20, description="tokens that are read at a time")
    batch_size: Batch = Field(default=4, description="windows in a step")
    max_epochs: Passes = Field(default=10.0, description="passes over the project at most")
    patience: int = Field(default=2, ge=1, le=1000, description="passes without progress before it stops")
    seed: Seed = Field(default=0, description="of the split, of new weights and of the order")

    def variants(self) -> list[Self]:
        return [self.model_copy(update={"way": way}) for way in WAYS] if self.way == "all" else [self]

    @property
    def label(self) -> str:
        return self.way

    @property
    def tuning(self) -> Tuning:
        """What `personalize` is told."""
        return Tuning(cast("Literal['custom']", self.way), self.last_n_blocks, self.num_virtual_tokens, self.rank)

    def read(self, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[SourceFile]:
        """The shuffled files of a project, see `read_project`."""
        return read_project(path, tokenizer, self.seed)

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        files: Sequence[SourceFile],
        output_dir: str | Path,
        progress: Progress | None = None,
    ) -> PersonalizedTrainer:
        tuning, from_text = self.tuning, self.prefix_init == "text"
        own = RANDOM_PREFIX_RATE if tuning.way == "prefix" and not from_text else RATES[tuning.way]
        config = PersonalConfig(
            output_dir=str(output_dir),
            window=self.window,
            patience=self.patience,
            text_start=from_text,
            learning_rate=self.learning_rate or own,
            per_device_train_batch_size=self.batch_size,
            num_train_epochs=self.max_epochs,
            seed=self.seed,
            use_cpu=model.device.type == "cpu",
            disable_tqdm=progress is not None,
        )
        trainer = PersonalizedTrainer(model, config, tuning, files, tokenizer)
        if progress:
            report_progress(trainer, progress)
        return trainer

    def score(self, trainer: PersonalizedTrainer, files: Sequence[SourceFile]) -> dict[str, float]:
        """Of windows of these files; before training, of the model as it was."""
        found = trainer.foretell(files)
        lines = sum(one.lines for one in found)
        return {"loss": mean_loss(found), "exact_match": sum(one.exact for one in found) / max(lines, 1)}

    def costs(self, trainer: PersonalizedTrainer) -> dict[str, float]:
        """Operations of the training, weights that were trained, and bytes to store for the project."""
        kept = report(trainer.model)
        return dict(zip(self.costs_named, (trainer.flops, float(kept.trained), float(kept.bytes))))

    def save(self, trainer: PersonalizedTrainer, folder: Path) -> None:
        """The delta, and in peft's own format what peft can load."""
        ProjectDelta.of(trainer.model, trainer.tuning, trainer.made_for).save(folder)
        if trainer.tuning.way in ("prefix", "lora"):
            cast("PeftModel", trainer.model).save_pretrained(str(folder / "adapter"))
