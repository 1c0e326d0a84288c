"""Trainers on single-token preference pairs: FTPO, and DPO for comparison.

Paper: Antislop (arXiv 2510.15061), Final Token Preference Optimization.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from ...core.errors import InputError
from ...hooks.layers import skip_layers
from ...hooks.residual import edit_inputs
from ...models.anatomy import decoder_layers
from ..adapters import with_adapter
from ..contract import HouseConfig, MeanLossTrainer
from .collator import FTPOCollator, last_logits
from .losses import choice_win, final_token_dpo_loss, ftpo_loss
from .pairs import Pair, check_pairs

__all__ = ["FTPOConfig", "FTPOTrainer", "FinalTokenDPOTrainer"]


@dataclass
class FTPOConfig(HouseConfig):
    """`HouseConfig` with the terms of `ftpo_loss` and the paper's schedule."""

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
    warmup_steps: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 2.5
    logging_steps: float = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("margin", "temperature", "early_stop_choice_win"):
            if getattr(self, name) <= 0:
                raise InputError(f"{name}={getattr(self, name)} is not allowed; give a number > 0")

    def loss_terms(self) -> dict[str, float]:
        """The keyword arguments of `ftpo_loss`."""
        names = ("margin", "lambda_nontarget", "lambda_target", "tau_target", "lambda_aggregate", "tau_aggregate")
        return {name: getattr(self, name) for name in (*names, "temperature")}


class FTPOTrainer(MeanLossTrainer):
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
