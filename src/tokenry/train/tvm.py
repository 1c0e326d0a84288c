"""Training a token value model: solutions to the same question that share a prefix say what that prefix is worth.

Paper: Token-Supervised Value Models for Enhancing Mathematical Problem-Solving Capabilities of Large Language Models,
arXiv 2407.12863, ICLR 2025. The loss and its constants are those usual for verifiers; the paper's were not available.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.fields import Batch, Count, Passes, Rate, Seed
from ..core.progress import Progress
from ..learned.token_values import TokenValueModel
from .contract import TrainMethod, report_progress
from .token_values.loss import ValueLoss
from .token_values.solutions import GradedQuestion, read_solutions, value_examples
from .token_values.trainer import ValueConfig, ValueTrainer, value_errors

__all__ = ["TVMTraining"]


class TVMTraining(TrainMethod):
    """Learn from graded solutions how likely a solution with a given beginning ends right."""

    slug: ClassVar[str] = "tvm"
    title: ClassVar[str] = "Token value model"
    paper: ClassVar[str] = (
        "Token-Supervised Value Models for Enhancing Mathematical Problem-Solving Capabilities of Large Language "
        "Models, ICLR 2025, arXiv 2407.12863"
    )
    claim: ClassVar[str] = "Counting which solutions share a prefix labels every token, without further sampling."
    examples: ClassVar[str] = "questions"
    data: ClassVar[str] = "a file of JSON lines, a question with its graded solutions in each"
    measures: ClassVar[dict[str, str]] = {
        "error_first": "squared error of the value to the label at a solution's first token",
        "error_middle": "at the middle token",
        "error_last": "at the last token",
    }
    next_step: ClassVar[str] = "tokenry decode --method tvm-search -o values={output} --model {model} PROMPT"

    loss: ValueLoss = Field(default="mse", description="squared error, or cross-entropy to soft labels")
    min_prefix_count: Count = Field(default=1, description="solutions that a label must come from; others are left out")
    learning_rate: Rate = Field(default=1e-5, description="highest learning rate")
    batch_size: Batch = Field(default=128, description="solutions in a step")
    epochs: Passes = Field(default=2.0, description="passes over the solutions")
    max_length: int = Field(default=4096, ge=2, le=2**20, description="tokens of a question and solution that are kept")
    chat: bool = Field(default=True, description="put text prompts through the chat template, as in generation")
    seed: Seed = Field(default=0, description="of the order")

    def read(self, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[GradedQuestion]:
        """The shuffled questions in a file, see `read_solutions`; what is held out shares no question with the rest."""
        questions = read_solutions(path, tokenizer, self.chat)
        random.Random(self.seed).shuffle(questions)
        return questions

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[GradedQuestion],
        output_dir: str | Path,
        progress: Progress | None = None,
    ) -> ValueTrainer:
        """A trainer of a value model that begins as a copy of the model."""
        config = ValueConfig(
            str(output_dir),
            loss=self.loss,
            max_length=self.max_length,
            learning_rate=self.learning_rate,
            per_device_train_batch_size=self.batch_size,
            num_train_epochs=self.epochs,
            seed=self.seed,
            use_cpu=model.device.type == "cpu",
            disable_tqdm=progress is not None,
        )
        values = TokenValueModel.from_language_model(model, tokenizer)
        examples = value_examples(questions, self.min_prefix_count)
        trainer = ValueTrainer(values, config, examples, processing_class=tokenizer)
        if progress:
            report_progress(trainer, progress)
        return trainer

    def score(self, trainer: ValueTrainer, questions: Sequence[GradedQuestion]) -> dict[str, float]:
        """How far values are from the labels of other questions."""
        found = value_errors(trainer.model.eval(), value_examples(questions), trainer.data_collator, self.batch_size)
        return dict(zip(self.measures, found.nanmean(0).tolist()))

    def save(self, trainer: ValueTrainer, folder: Path) -> None:
        trainer.model.eval().save_pretrained(folder)
