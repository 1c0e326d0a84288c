"""FTPO: teach a model not to begin an unwanted pattern, from the logits at one position.

Paper: Antislop (arXiv 2510.15061), Final Token Preference Optimization. At the end of a context each chosen token must
beat the rejected one by a margin, after which it stops pulling; all other logits are tied to the reference model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.claim import Claim
from ..core.fields import (
    Batch,
    Count,
    Layers,
    Passes,
    Positive,
    Probability,
    Rate,
    Seed,
    Share,
    Temperature,
    Tokens,
    Weight,
    Width,
)
from ..core.progress import Progress
from .adapters import lora_last_layers, merged, save_adapter
from .contract import TrainMethod, report_progress
from .preference.evaluation import score_pairs
from .preference.pairs import Pair, balance_pairs, read_pairs, to_pairs, without_function_words
from .preference.trainer import FTPOConfig, FTPOTrainer

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["FTPO", "auto_learning_rate"]


class FTPO(TrainMethod):
    """Train what a decode run took back out of the model."""

    slug: ClassVar[str] = "ftpo"
    title: ClassVar[str] = "FTPO"
    paper: ClassVar[str] = (
        "Antislop: A Comprehensive Framework for Identifying and Eliminating Repetitive Patterns "
        "in Language Models, arXiv 2510.15061"
    )
    claim: ClassVar[str] = (
        "After training on the rewinds of Antislop, plain sampling avoids about 90 % of the banned patterns at no loss "
        "of quality; DPO on the same pairs avoids fewer and costs more."
    )
    published: ClassVar[Claim] = Claim(
        "90 %", "fewer banned patterns (DPO: 80 to 82 %)", "range over models 83 to 92 %"
    )
    examples: ClassVar[str] = "pairs"
    measures: ClassVar[dict[str, str]] = {
        "rejected": "probability of the rejected token",
        "chosen": "probability of the chosen tokens",
        "choice_win": "share of chosen tokens above the rejected one",
        "drift": "mean change of the other logits",
    }
    next_step: ClassVar[str] = "tokenry decode --model {output} PROMPT"

    margin: Positive = Field(default=2.0, description="logits by which a chosen token must beat the rejected one")
    lambda_nontarget: Weight = Field(default=0.4, description="weight on the drift of all other logits")
    lambda_target: Weight = Field(default=0.05, description="weight on the drift of chosen and rejected logits")
    tau_target: Weight = Field(default=1.0, description="drift of these that costs nothing, in logits")
    lambda_aggregate: Weight = Field(default=0.0, description="weight on the drift of their mean")
    tau_aggregate: Weight = Field(default=2.0, description="drift of the mean that costs nothing, in logits")
    temperature: Temperature = Field(default=1.0, description="softness of the preference term")
    early_stop_choice_win: Positive = Field(default=0.85, description="stop at this choice_win; above 1 never")
    min_chosen: Count = Field(default=4, description="pairs with fewer chosen tokens are dropped")
    rejected_balance: Probability = Field(default=0.8, description="how far frequent rejected tokens are held back")
    max_examples: Count = Field(default=1000, description="most pairs to train on")
    function_words: bool = Field(default=False, description="keep pairs that reject a word such as ' the'")
    rank: Width = Field(default=128, description="rank of LoRA, and its alpha")
    last_layers: Layers = Field(default=6, description="blocks that are trained, from the top")
    lm_head: bool = Field(default=True, description="train the unembedding too")
    dropout: Share = Field(default=0.05, description="dropout of LoRA")
    learning_rate: Rate | None = Field(default=None, description="none: by the paper's rule from pairs, batch and rank")
    batch_size: Batch = Field(default=16, description="pairs in a step")
    epochs: Passes = Field(default=1.0, description="passes over the pairs")
    max_length: Tokens = Field(default=2048, description="context tokens kept, from the right")
    seed: Seed = Field(default=3407, description="of the choice of pairs, of LoRA and of the order")

    def read(self, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
        """The balanced training pairs in a file, see `read_pairs`."""
        return self.pairs(read_pairs(path, tokenizer), tokenizer)

    def pairs(self, rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Pair]:
        """The balanced training pairs from rewinds, pairs of ids or pairs of text."""
        pairs = to_pairs(rows, tokenizer)
        pairs = balance_pairs(pairs, self.rejected_balance, self.max_examples, self.min_chosen, self.seed)
        return pairs if self.function_words else without_function_words(pairs, tokenizer)

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[Pair],
        output_dir: str | Path,
        trainer_class: type[FTPOTrainer] = FTPOTrainer,
        progress: Progress | None = None,
        **arguments: Any,
    ) -> FTPOTrainer:
        """A trainer with LoRA for `pairs` (from `self.pairs`); call its `train()`.

        Args:
            progress: called with (steps done, steps); nothing is printed then.
            arguments: anything `FTPOConfig` takes.
        """
        if progress:
            arguments["disable_tqdm"] = True
        rate = self.learning_rate or auto_learning_rate(len(pairs), self.batch_size, self.rank)
        names = {f for f in type(self).model_fields if f in FTPOConfig.__dataclass_fields__}
        config = FTPOConfig(
            output_dir=str(output_dir),
            **{
                **{name: getattr(self, name) for name in names if name != "learning_rate"},
                "learning_rate": rate,
                "per_device_train_batch_size": self.batch_size,
                "num_train_epochs": self.epochs,
                **arguments,
            },
        )
        torch.manual_seed(self.seed)
        lora = lora_last_layers(model, self.rank, self.last_layers, self.dropout, self.lm_head)
        trainer = trainer_class(model, config, list(pairs), processing_class=tokenizer, peft_config=lora)
        if progress:
            report_progress(trainer, progress)
        return trainer

    def score(self, trainer: FTPOTrainer, pairs: Sequence[Pair]) -> dict[str, float]:
        columns = score_pairs(trainer.model, pairs, trainer.data_collator)
        return {name: float(column.mean()) for name, column in columns.items()}

    def save(self, trainer: FTPOTrainer, folder: Path) -> None:
        """The merged model, which loads anywhere, and the adapter beside it."""
        model, tokenizer = cast("PeftModel", trainer.model), cast(PreTrainedTokenizerBase, trainer.processing_class)
        save_adapter(model, folder / "adapter")
        merged(model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def auto_learning_rate(examples: int, batch_size: int, rank: int, scale: float = 0.15) -> float:
    """The learning rate of the official recipe for `examples` pairs and an effective batch."""
    base = 1e-3 * math.sqrt(batch_size / 256) * math.sqrt(rank / 8) * 0.15 * scale
    small, large = base * math.sqrt(1e4 / examples), base * math.sqrt(1e4 / 5000) * 5000 / examples
    weight = (1 + math.tanh((examples - 5000) / 1000)) / 2
    return (1 - weight) * small + weight * large
