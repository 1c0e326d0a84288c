"""FTPO: teach a model not to begin an unwanted pattern, from the logits at one position.

Paper: Antislop (arXiv 2510.15061), Final Token Preference Optimization. At the end of a context each chosen token must
beat the rejected one by a margin, after which it stops pulling; all other logits are tied to the reference model.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from ..core.errors import InputError
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
from ..hooks.layers import skip_layers
from ..hooks.residual import edit_inputs
from ..models.anatomy import decoder_layers
from ..models.batch import left_padded, position_ids, right_padded
from .adapters import lora_last_layers, merged, save_adapter, with_adapter
from .contract import TrainMethod, report_progress
from .preference.losses import choice_win, final_token_dpo_loss, ftpo_loss, others, target_ids
from .preference.pairs import Pair, balance_pairs, check_pairs, read_pairs, to_pairs, without_function_words

__all__ = [
    "FTPO",
    "FTPOCollator",
    "FTPOConfig",
    "FTPOTrainer",
    "FinalTokenDPOTrainer",
    "auto_learning_rate",
    "score_pairs",
]


# --- batches -------------------------------------------------------------------------------------------------------


@dataclass
class FTPOCollator:
    """Left-pads the contexts of pairs; longer ones keep their right end.

    Returns `input_ids`, `attention_mask`, `position_ids` (batch, time), `chosen_ids`, `chosen_mask` (batch, chosen)
    and `rejected_ids` (batch,).
    """

    pad_token_id: int
    max_length: int = 2048
    truncate: bool = True

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Tensor]:
        longest = max(len(pair["prompt_ids"]) for pair in pairs)
        if longest > self.max_length and not self.truncate:
            raise InputError(f"a context has {longest} tokens, max_length is {self.max_length}; raise it or truncate")
        contexts = [pair["prompt_ids"][-self.max_length :] for pair in pairs]
        ids, mask = left_padded(contexts, pad=self.pad_token_id)
        chosen_ids, chosen_mask = right_padded([pair["chosen_ids"] for pair in pairs], self.pad_token_id)
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "position_ids": position_ids(mask),
            "chosen_ids": chosen_ids,
            "chosen_mask": chosen_mask,
            "rejected_ids": torch.tensor([pair["rejected_id"] for pair in pairs]),
        }


CONTEXT = ("input_ids", "attention_mask", "position_ids")


def last_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits (batch, vocab) after the last token of left-padded contexts."""
    return model(**{name: batch[name] for name in CONTEXT}, logits_to_keep=1, use_cache=False).logits[:, -1]


@torch.no_grad()
def score_pairs(
    model: nn.Module, pairs: Sequence[Pair], collator: FTPOCollator, batch_size: int = 16, reference: bool = True
) -> dict[str, Tensor]:
    """What a model does at each context; the columns have the shape (pairs,).

    Returns:
        `choice_win` (share of chosen tokens above the rejected one), `rejected` and `chosen` (probability of the
        rejected token, and of all chosen ones together) and, for a model with an adapter, `drift` (mean absolute
        change of the other logits).
    """
    columns: dict[str, list[Tensor]] = defaultdict(list)
    device = next(model.parameters()).device
    training, adapter = model.training, reference and hasattr(model, "disable_adapter")
    model.eval()
    for start in range(0, len(pairs), batch_size):
        batch = {k: v.to(device) for k, v in collator(pairs[start : start + batch_size]).items()}
        logits = last_logits(model, batch).float()
        chosen, mask, rejected = batch["chosen_ids"], batch["chosen_mask"], batch["rejected_ids"][:, None]
        wins = (logits.gather(1, chosen) > logits.gather(1, rejected)) & mask
        probability = logits.softmax(-1)
        columns["choice_win"].append(wins.sum(1) / mask.sum(1))
        columns["rejected"].append(probability.gather(1, rejected)[:, 0])
        columns["chosen"].append((probability.gather(1, chosen) * mask).sum(1))
        if adapter:
            with model.disable_adapter():
                drift = (logits - last_logits(model, batch).float()).abs()
            outside = others(drift, target_ids(chosen, mask, batch["rejected_ids"]))
            columns["drift"].append((drift * outside).sum(1) / outside.sum(1))
    model.train(training)
    return {name: torch.cat(parts).cpu() for name, parts in columns.items()}


# --- the trainer ---------------------------------------------------------------------------------------------------


@dataclass
class FTPOConfig(TrainingArguments):
    """`TrainingArguments` with the terms of `ftpo_loss` and the paper's schedule."""

    margin: float = field(default=2.0, metadata={"help": "logits by which a chosen token must beat the rejected one"})
    lambda_nontarget: float = field(default=0.4, metadata={"help": "weight on the drift of all other logits"})
    lambda_target: float = field(default=0.05, metadata={"help": "weight on the drift of chosen and rejected logits"})
    tau_target: float = field(default=1.0, metadata={"help": "drift of these that costs nothing"})
    lambda_aggregate: float = field(default=0.0, metadata={"help": "weight on the drift of their mean"})
    tau_aggregate: float = field(default=2.0, metadata={"help": "drift of the mean that costs nothing"})
    temperature: float = field(default=1.0, metadata={"help": "softness of the preference term"})
    early_stop_choice_win: float = field(default=0.85, metadata={"help": "stop at this choice_win; above 1: never"})
    max_length: int = field(default=2048, metadata={"help": "context tokens kept, from the right"})
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 16
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 2.5
    logging_steps: float = 5
    save_strategy: str = "no"
    report_to: str = "none"
    dataloader_pin_memory: bool = field(default_factory=torch.cuda.is_available)
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("margin", "temperature", "early_stop_choice_win"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}={getattr(self, name)} is not allowed; give a number > 0")

    def loss_terms(self) -> dict[str, float]:
        """The keyword arguments of `ftpo_loss`."""
        names = ("margin", "lambda_nontarget", "lambda_target", "tau_target", "lambda_aggregate", "tau_aggregate")
        return {name: getattr(self, name) for name in (*names, "temperature")}


class FTPOTrainer(Trainer):
    """A `transformers.Trainer` on single-token preference pairs (arXiv 2510.15061).

    The reference is the model with its adapter switched off, or `ref_model`. Where only the last blocks have an
    adapter, the reference shares the frozen ones below: it costs those blocks alone.

    Args:
        model: a causal language model; with `peft_config` it gets that adapter.
        train_dataset, eval_dataset: pairs with the columns prompt_ids, chosen_ids, rejected_id.
        ref_model: a frozen copy, where there is no adapter.

    Raises:
        InputError: neither adapter nor reference, or pairs that `check_pairs` refuses.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: FTPOConfig,
        train_dataset: Sequence[Pair],
        eval_dataset: Sequence[Pair] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        ref_model: PreTrainedModel | None = None,
        data_collator: FTPOCollator | None = None,
        **kwargs: Any,
    ) -> None:
        if not len(train_dataset):
            raise InputError("there are no pairs to train on; sample more, or hold fewer out")
        for pairs in (train_dataset, eval_dataset or ()):
            check_pairs(pairs, model.config.get_text_config().vocab_size)
        if peft_config is not None:
            model = with_adapter(model, peft_config)
        if ref_model is None and not hasattr(model, "disable_adapter"):
            raise InputError(
                "there is neither an adapter nor a reference, so the model would be compared with itself; "
                "pass peft_config=LoraConfig(...) or ref_model=a frozen copy"
            )
        if data_collator is None:
            data_collator = FTPOCollator(_pad_id(model, processing_class), args.max_length)
        self.ref_model = None if ref_model is None else ref_model.eval()
        self.parts: dict[str, list[Tensor]] = defaultdict(list)
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class=processing_class, **kwargs
        )
        self.frozen = _frozen_layers(self.model) if ref_model is None else 0
        self.model_accepts_loss_kwargs = False  # the loss is a mean of its own, whatever the accumulation
        if args.early_stop_choice_win <= 1:
            self.add_callback(_StopAtChoiceWin(args.early_stop_choice_win))

    def pair_loss(self, logits: Tensor, reference: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict]:
        """The loss of a batch and what is logged with it."""
        output = ftpo_loss(logits, reference, **targets, **self.args.loss_terms())
        return output.loss, {k: v for k, v in output._asdict().items() if k != "loss"}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not inputs["attention_mask"][:, -1].all():
            raise InputError("a row is padded on the right, so its last position is padding; pad on the left")
        logits, reference = self._both_logits(model, inputs)
        targets = {name: inputs[name] for name in ("chosen_ids", "chosen_mask", "rejected_ids")}
        loss, parts = self.pair_loss(logits, reference, targets)
        for name, value in parts.items():
            self.parts[name if model.training else f"eval_{name}"].append(value.detach())
        return (loss, {"logits": logits}) if return_outputs else loss

    def _both_logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Last logits of the policy and of the reference."""
        if self.ref_model is not None:
            with torch.no_grad():
                reference = last_logits(self.ref_model, inputs)
            return last_logits(model, inputs), reference
        plain = self.accelerator.unwrap_model(model)
        first = decoder_layers(plain)[self.frozen]
        shared: list[Tensor] = []
        with edit_inputs(plain, {first: lambda hidden: shared.append(hidden) or hidden}):
            logits = last_logits(model, inputs)
        executed = range(self.frozen, len(decoder_layers(plain)))
        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(plain.disable_adapter())
            stack.enter_context(edit_inputs(plain, {first: lambda hidden: shared[0].detach()}))
            stack.enter_context(skip_layers(plain, executed))
            return logits, last_logits(plain, inputs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every part since the last log, over all processes, so that all of them stop together."""
        evaluated = any(key.startswith("eval_") for key in logs)
        wanted = sorted(name for name in self.parts if name.startswith("eval_") == evaluated)  # everywhere in one order
        if wanted:
            means = torch.stack([torch.stack(self.parts.pop(name)).mean() for name in wanted])
            logs |= zip(wanted, self.accelerator.gather(means[None]).mean(0).tolist())
        super().log(logs, start_time)


class FinalTokenDPOTrainer(FTPOTrainer):
    """DPO on the same pairs, for comparison."""

    beta = 0.1

    def pair_loss(self, logits: Tensor, reference: Tensor, targets: dict[str, Tensor]) -> tuple[Tensor, dict]:
        loss = final_token_dpo_loss(logits, reference, **targets, beta=self.beta)
        lead = logits.gather(1, targets["chosen_ids"]) - logits.gather(1, targets["rejected_ids"][:, None])
        return loss, {"choice_win": choice_win(lead, targets["chosen_mask"])}


class _StopAtChoiceWin(TrainerCallback):
    """Ends training when the mean choice_win since the last log reaches a threshold."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and logs.get("choice_win", 0.0) >= self.threshold:
            control.should_training_stop = True


def _pad_id(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> int:
    for owner in (tokenizer, model.config.get_text_config()):
        if getattr(owner, "pad_token_id", None) is not None:
            return owner.pad_token_id
    return 0  # behind the attention mask any token will do


def _frozen_layers(model: nn.Module) -> int:
    """How many blocks from the bottom have nothing to train, when the embeddings have not either."""
    layers = decoder_layers(model)
    if any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        return 0
    trained = [i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())]
    return min(trained, default=len(layers) - 1)


def auto_learning_rate(examples: int, batch_size: int, rank: int, scale: float = 0.15) -> float:
    """The learning rate of the official recipe for `examples` pairs and an effective batch."""
    base = 1e-3 * math.sqrt(batch_size / 256) * math.sqrt(rank / 8) * 0.15 * scale
    small, large = base * math.sqrt(1e4 / examples), base * math.sqrt(1e4 / 5000) * 5000 / examples
    weight = (1 + math.tanh((examples - 5000) / 1000)) / 2
    return (1 - weight) * small + weight * large


# --- the method ----------------------------------------------------------------------------------------------------


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
    examples: ClassVar[str] = "pairs"
    measures: ClassVar[dict[str, str]] = {
        "rejected": "probability of the rejected token",
        "chosen": "probability of the chosen tokens",
        "choice_win": "share of chosen tokens above the rejected one",
        "drift": "mean change of the other logits",
    }
    next_step: ClassVar[str] = "tokenry decode --model {output} PROMPT"

    margin: Positive = Field(2.0, description="logits by which a chosen token must beat the rejected one")
    lambda_nontarget: Weight = Field(0.4, description="weight on the drift of all other logits")
    lambda_target: Weight = Field(0.05, description="weight on the drift of chosen and rejected logits")
    tau_target: Weight = Field(1.0, description="drift of these that costs nothing, in logits")
    lambda_aggregate: Weight = Field(0.0, description="weight on the drift of their mean")
    tau_aggregate: Weight = Field(2.0, description="drift of the mean that costs nothing, in logits")
    temperature: Temperature = Field(1.0, description="softness of the preference term")
    early_stop_choice_win: Positive = Field(0.85, description="stop at this choice_win; above 1 never")
    min_chosen: Count = Field(4, description="pairs with fewer chosen tokens are dropped")
    rejected_balance: Probability = Field(0.8, description="how far frequent rejected tokens are held back")
    max_examples: Count = Field(1000, description="most pairs to train on")
    function_words: bool = Field(False, description="keep pairs that reject a word such as ' the'")
    rank: Width = Field(128, description="rank of LoRA, and its alpha")
    last_layers: Layers = Field(6, description="blocks that are trained, from the top")
    lm_head: bool = Field(True, description="train the unembedding too")
    dropout: Share = Field(0.05, description="dropout of LoRA")
    learning_rate: Rate | None = Field(None, description="none: by the paper's rule from pairs, batch and rank")
    batch_size: Batch = Field(16, description="pairs in a step")
    epochs: Passes = Field(1.0, description="passes over the pairs")
    max_length: Tokens = Field(2048, description="context tokens kept, from the right")
    seed: Seed = Field(3407, description="of the choice of pairs, of LoRA and of the order")

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
        progress: Callable[..., None] | None = None,
        **arguments: Any,
    ) -> FTPOTrainer:
        """A trainer with LoRA for `pairs` (from `self.pairs`); call its `train()`.

        Args:
            progress: called with completed=steps, total=steps; nothing is printed then.
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
        save_adapter(trainer.model, folder / "adapter")
        merged(trainer.model).save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
