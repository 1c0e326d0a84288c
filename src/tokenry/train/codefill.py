"""CodeFill: a completion model for code learns from names, from their types and from whole statements at once.

Paper: CodeFill: Multi-token Code Completion by Jointly Learning from Structure and Naming Sequences, ICSE 2022, arXiv
2202.06689. Three models of one shape learn a task each, and the squared distance of their blocks is part of the loss.
What is kept is the value model, a plain causal one. The authors' notebook ties nothing; this follows the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import BeforeValidator, Field, field_validator, model_validator
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Batch, Layers, Passes, Probability, Rate, Seed, Weight, read_none
from ..core.progress import Progress
from .completion.programs import Program, read_programs
from .completion.shared import SoftSharedLM
from .completion.tasks import TASKS, examples_of
from .completion.trainer import CodeFillConfig, MultiTaskTrainer, check_task_probs, collate
from .completion.vocabulary import TYPE_IDS, value_tokenizer
from .contract import TrainMethod, report_progress

__all__ = ["CodeFill"]

SCORED = 400  # windows of each task that are measured


def _read_probs(value: Any) -> Any:
    """Numbers with commas between, as the command line gives them."""
    return tuple(value.split(",")) if isinstance(value, str) else value


class CodeFill(TrainMethod):
    """Train a small model of code from nothing on a folder of Python or JavaScript files."""

    slug: ClassVar[str] = "codefill"
    title: ClassVar[str] = "CodeFill"
    paper: ClassVar[str] = (
        "CodeFill: Multi-token Code Completion by Jointly Learning from Structure and Naming Sequences, ICSE 2022, "
        "arXiv 2202.06689"
    )
    claim: ClassVar[str] = (
        "Learning the types of tokens and the ends of statements beside the values, in models drawn together, gives a "
        "better model of values, and names declared nearby should go first."
    )
    published: ClassVar[Claim] = Claim(
        "80.6", "% of all tokens right (value only 77.7)", "258 million parameters, PY117K test"
    )
    examples: ClassVar[str] = "programs"
    data: ClassVar[str] = "a folder of Python or JavaScript files, or one"
    takes_folder: ClassVar[bool] = True
    measures: ClassVar[dict[str, str]] = {
        "loss": "nats per token of values",
        "accuracy": "share of value tokens right",
        "statements": "share right in the rest of statements",
        "types": "share of types right",
    }
    next_step: ClassVar[str] = "tokenry decode --method codefill --model {output} --file FILE.py:LINE:COLUMN"

    sharing: Literal["soft", "hard", "none"] = Field(
        default="soft", description="blocks drawn together, one and the same for all tasks, or each task's own"
    )
    task_probs: Annotated[tuple[Probability, Probability, Probability], BeforeValidator(_read_probs)] = Field(
        default=(0.2, 0.4, 0.4), description="how often a step is one of types, values, statements; they sum to 1"
    )
    share_weight: Annotated[Weight | None, BeforeValidator(read_none)] = Field(
        default=None, description="of the squared distance of blocks; none: a tenth of the first loss"
    )
    combine: Literal["picked", "min", "sum"] = Field(
        default="picked", description="a step trains the task drawn, that of the smallest loss, or all"
    )
    layers: Layers = Field(default=4, description="blocks of each model, a new Llama")
    width: int = Field(default=256, ge=8, le=2**14, multiple_of=8, description="their width, a multiple of 8")
    heads: int = Field(default=4, ge=1, le=1024, description="attention heads")
    vocab_size: int = Field(default=8192, ge=300, le=2**20, description="entries of the value vocabulary at most")
    max_length: int = Field(default=512, ge=8, le=2**20, description="tokens of a window")
    lr: Rate = Field(default=5e-4, description="highest learning rate")
    epochs: Passes = Field(default=1.0, description="passes over the values")
    batch_size: Batch = Field(default=8, description="windows in a step")
    seed: Seed = Field(default=0, description="of the first weights, the cuts and the order")

    @field_validator("task_probs")
    @classmethod
    def _is_distribution(cls, probs: tuple[float, float, float]) -> tuple[float, float, float]:
        check_task_probs(probs)
        return probs

    @model_validator(mode="after")
    def _can_be_trained(self) -> CodeFill:
        if not self.task_probs[TASKS.index("tvp")]:
            raise ValueError("task_probs gives the values no step, and the value model is what is kept; give it some")
        if self.width % (2 * self.heads):
            raise ValueError(f"width={self.width} does not divide into {self.heads} heads of even width; give another")
        return self

    def read(self, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[Program]:
        """The programs of a folder, see `read_programs`; the vocabulary is learned by `trainer`."""
        return read_programs(path, self.seed)

    @property
    def tasks(self) -> list[str]:
        """The tasks that are trained."""
        return [task for task, share in zip(TASKS, self.task_probs) if share]

    def untrained(self, tokenizer: PreTrainedTokenizerBase) -> SoftSharedLM:
        """New models, each from a seed of its own, so that no task changes the first weights of another."""
        models: dict[str, PreTrainedModel] = {}
        for task in self.tasks:
            torch.manual_seed(self.seed + 1000 * TASKS.index(task))
            models[task] = LlamaForCausalLM(self._config(tokenizer, len(TYPE_IDS) if task == "ttp" else None))
            if self.sharing == "hard":
                models[task].model.layers = models[self.tasks[0]].model.layers
        return SoftSharedLM(models, self.share_weight if self.sharing == "soft" else 0.0)

    def trainer(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        programs: Sequence[Program],
        output_dir: str | Path,
        progress: Progress | None = None,
        words: PreTrainedTokenizerBase | None = None,
        value_steps: int | None = None,
    ) -> MultiTaskTrainer:
        """A trainer of new models on the device of `model`, which is not changed; nor is its tokenizer used.

        Args:
            words: the vocabulary; by default it is learned from the programs.
            value_steps: steps of values, instead of those of `epochs`.

        Raises:
            InputError: no programs, or too little in them for a window of each task.
        """
        if not programs:
            raise InputError("there are no programs to train on; give more files, or hold fewer out")
        words = words or value_tokenizer((program.views.values for program in programs), self.vocab_size)
        rows = [
            row
            for number, program in enumerate(programs)
            for row in examples_of(program.views, words, self.tasks, self.max_length, self.seed + number)
        ]
        windows = sum(row["task"] == "tvp" for row in rows)
        config = CodeFillConfig(
            str(output_dir),
            task_probs=self.task_probs,
            combine=self.combine,
            value_steps=value_steps or max(1, round(self.epochs * windows / self.batch_size)),
            learning_rate=self.lr,
            warmup_steps=0.1,
            per_device_train_batch_size=self.batch_size,
            seed=self.seed,
            use_cpu=model.device.type == "cpu",
            disable_tqdm=progress is not None,
        )
        trainer = MultiTaskTrainer(self.untrained(words), config, rows, processing_class=words)
        if progress:
            report_progress(trainer, progress)
        return trainer

    def score(self, trainer: MultiTaskTrainer, programs: Sequence[Program]) -> dict[str, float]:
        """Loss and accuracy of the next token, at up to `SCORED` windows of each task."""
        words = cast(PreTrainedTokenizerBase, trainer.processing_class)
        found: dict[str, list[Tensor]] = {task: [] for task in TASKS}
        for program in programs:
            for row in examples_of(program.views, words, self.tasks, self.max_length, self.seed):
                if len(found[row["task"]]) < SCORED:
                    batch = {name: part.to(trainer.model.device) for name, part in collate([row])[row["task"]].items()}
                    found[row["task"]].append(_predicted(trainer.model, row["task"], **batch))
        means = {task: torch.cat(parts).mean(0).tolist() if parts else [0.0, 0.0] for task, parts in found.items()}
        (loss, accuracy), (_, statements), (_, types) = means["tvp"], means["sc"], means["ttp"]
        return {"loss": loss, "accuracy": accuracy, "statements": statements, "types": types}

    def save(self, trainer: MultiTaskTrainer, folder: Path) -> None:
        trainer.model.export("tvp").eval().save_pretrained(folder)
        cast(PreTrainedTokenizerBase, trainer.processing_class).save_pretrained(folder)

    def _config(self, tokenizer: PreTrainedTokenizerBase, types: int | None) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=types or len(tokenizer),
            hidden_size=self.width,
            intermediate_size=8 * self.width // 3,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=max(self.max_length, 2048),
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None if types else cast(int, tokenizer.eos_token_id),
            pad_token_id=None if types else cast(int, tokenizer.pad_token_id),
        )


@torch.no_grad()
def _predicted(model: SoftSharedLM, task: str, input_ids: Tensor, labels: Tensor) -> Tensor:
    """(learned tokens, 2): the loss of each, and whether it was the likeliest."""
    was_training = model.training
    logits = model.eval()(task, input_ids).logits[:, :-1].float()
    model.train(was_training)
    goal = labels[:, 1:]
    learned = goal != -100
    loss = torch.nn.functional.cross_entropy(logits[learned], goal[learned], reduction="none")
    return torch.stack([loss, (logits[learned].argmax(-1) == goal[learned]).float()], -1)
