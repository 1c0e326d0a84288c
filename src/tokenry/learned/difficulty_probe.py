"""Easy, normal or hard: what the model's state says of a question before it is answered.

`read_questions` reads a batch of questions once and keeps the cache; `DifficultyProbe` turns the state of each
question's last token into the probabilities of three classes. A probe is trained by the stage read and used by the
stage decode.

Paper: DiffAdapt: Difficulty-Adaptive Reasoning for Token-Efficient LLM Inference, arXiv 2510.19669.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..core.artifact import Artifact, Folder, Header, MadeFor
from ..core.errors import InputError
from ..core.tensors import with_weights
from ..hooks.residual import capture_residual
from ..models.anatomy import decoder_body, decoder_layers, fingerprint
from ..models.batch import left_padded, pad_id, position_arguments
from ..models.positions import check_prompt_fits
from ..models.prompts import Prompt, listed_prompts, question_ids, template_hash

__all__ = ["CLASSES", "DifficultyProbe", "Questions", "read_questions"]


CLASSES = ("easy", "normal", "hard")


# --- the state of a question ---------------------------------------------------------------------------------------


class Questions(NamedTuple):
    """Questions that the model has read: left-padded `ids` and `mask` (batch, columns), the `cache` of these columns,
    and the output of the last decoder block, before the last norm, at each question's last token: `states` (batch,
    width), float32."""

    ids: Tensor
    mask: Tensor
    cache: Cache
    states: Tensor


@torch.no_grad()
def read_questions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], chat: bool = True
) -> Questions:
    """Read the questions of the prompts in one forward, without the words that a strategy would add."""
    rows = [question_ids(tokenizer, prompt, chat) for prompt in listed_prompts(prompts)]
    if not rows or not all(rows):
        raise InputError("there is no question to read; give at least one prompt, each with some text")
    check_prompt_fits(model, max(map(len, rows)))
    ids, mask = left_padded(rows, model.device, pad_id(tokenizer))
    body, cache = decoder_body(model), DynamicCache(config=model.config)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    last = len(decoder_layers(model)) - 1
    with capture_residual(model, [last]) as caught:
        body(**inputs, **position_arguments(body, mask))
    return Questions(ids, mask, cache, caught[last][0][:, -1].float())


# --- the probe -----------------------------------------------------------------------------------------------------


class Reads(MadeFor):
    """Whose states a probe reads."""

    layer: int
    normed: bool
    template: str


class ProbeHeader(Header):
    """What a saved probe says of itself."""

    hidden_size: int = Field(ge=1, lt=2**24)
    hidden: int = Field(ge=0, lt=2**24)
    n_classes: int = Field(ge=2, lt=2**16)
    held_out_accuracy: float = Field(allow_inf_nan=True)  # nan where no question was held out
    made_for: Reads


class DifficultyProbe(Artifact, nn.Module):
    """softmax(W2 relu(W1 h + b1) + b2) over easy, normal and hard, of standardized states h (arXiv 2510.19669).

    Args:
        hidden_size: width of the model.
        hidden: width of the hidden layer; 0 for a linear probe.

    `held_out_accuracy` is that of the questions `fit` kept back; `made_for` says for which model, layer and template
    (see `bind`).
    """

    kind = "probe"
    layout = Folder("probe.safetensors", "probe.json")
    fields = ProbeHeader
    remedy = "give a folder written by DifficultyProbe.save"
    unbound = "the probe belongs to no model yet; call bind(model, tokenizer) before save"
    mean: Tensor
    deviation: Tensor

    def __init__(self, hidden_size: int, hidden: int = 256, n_classes: int = len(CLASSES)) -> None:
        super().__init__()
        if hidden_size < 1 or hidden < 0 or n_classes < 2:
            raise InputError(
                f"hidden_size={hidden_size}, hidden={hidden}, n_classes={n_classes} is not allowed; give a width >= 1, "
                "a hidden width >= 0 (0: linear) and at least 2 classes"
            )
        self.hidden_size, self.hidden, self.n_classes = hidden_size, hidden, n_classes
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.register_buffer("deviation", torch.ones(hidden_size))
        layers = [nn.Linear(hidden_size, hidden), nn.ReLU()] if hidden else []
        self.layers = nn.Sequential(*layers, nn.Linear(hidden or hidden_size, n_classes))
        self.held_out_accuracy = float("nan")
        self.made_for: dict[str, Any] | None = None

    def forward(self, states: Tensor) -> Tensor:
        """Logits (batch, classes) of states (batch, hidden_size)."""
        if states.shape[-1] != self.hidden_size:
            raise InputError(
                f"the probe reads states of width {self.hidden_size}, not {states.shape[-1]}; use one of this model"
            )
        states = states.to(self.mean.device, torch.float32)
        return self.layers((states - self.mean) / self.deviation)

    @torch.no_grad()
    def probabilities(self, states: Tensor) -> Tensor:
        """Probabilities (batch, classes) of states (batch, hidden_size)."""
        return self(states).softmax(-1)

    def fit(
        self,
        features: Tensor,
        labels: Sequence[int] | np.ndarray | Tensor,
        *,
        learning_rate: float = 1e-3,
        epochs: int = 100,
        batch_size: int = 64,
        held_out: float = 0.1,
        seed: int = 0,
    ) -> DifficultyProbe:
        """Train on states (n, hidden_size) and classes (n,), from a fresh start: cross-entropy with classes weighted by
        the inverse of their frequency, AdamW, the best epoch on the questions held out.

        Raises:
            InputError: fewer than two classes, a class that does not exist, states that are not finite. A class without
                questions is a warning.
        """
        features, labels = features.detach().cpu().float(), torch.as_tensor(labels, dtype=torch.long)
        self._check_examples(features, labels)
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=draw)
        kept_back, used = order[: int(held_out * len(order))], order[int(held_out * len(order)) :]
        self._restart(features[used], seed)
        counts = labels[used].bincount(minlength=self.n_classes)
        weight = len(used) / (self.n_classes * counts.clamp(min=1))
        optimizer = torch.optim.AdamW(self.parameters(), lr=learning_rate)
        best, state = float("inf"), self.state_dict()
        for _ in range(epochs):
            for batch in used[torch.randperm(len(used), generator=draw)].split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(self(features[batch]), labels[batch], weight).backward()
                optimizer.step()
            loss = self._loss(features[kept_back], labels[kept_back], weight) if len(kept_back) else -float("inf")
            if loss < best or not len(kept_back):
                best, state = loss, {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.load_state_dict(state)
        if len(kept_back):
            right = self.probabilities(features[kept_back]).argmax(-1) == labels[kept_back]
            self.held_out_accuracy = float(right.float().mean())
        return self

    def _check_examples(self, features: Tensor, labels: Tensor) -> None:
        if features.dim() != 2 or len(features) != len(labels) or not bool(torch.isfinite(features).all()):
            raise InputError(
                f"features {tuple(features.shape)} for {len(labels)} labels are not allowed; give a finite state "
                "(width,) for each label"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.n_classes:
            raise InputError(f"labels must be classes 0 to {self.n_classes - 1}; found {sorted(set(labels.tolist()))}")
        names = CLASSES if self.n_classes == len(CLASSES) else tuple(map(str, range(self.n_classes)))
        empty = [name for name, count in zip(names, labels.bincount(minlength=self.n_classes).tolist()) if not count]
        if len(empty) > self.n_classes - 2:
            raise InputError(
                f"no question is {', '.join(empty)}, so there is nothing to tell apart; take questions that the model "
                "sometimes solves and sometimes not, or move alpha, beta and gamma"
            )
        if empty:
            warnings.warn(f"no question is {', '.join(empty)}; the probe will not know such questions", stacklevel=3)

    def _restart(self, features: Tensor, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in self.layers:
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
        self.mean.copy_(features.mean(0))
        self.deviation.copy_(features.std(0, correction=0).clamp(min=1e-6))

    @torch.no_grad()
    def _loss(self, features: Tensor, labels: Tensor, weight: Tensor) -> float:
        return float(F.cross_entropy(self(features), labels, weight))

    # --- whom it belongs to ------------------------------------------------------------------------------------------

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: bool = True) -> DifficultyProbe:
        """Say that it was trained on states of `model` after this tokenizer's template."""
        self.made_for = {
            "model": model.config._name_or_path,
            "fingerprint": fingerprint(model),
            "layer": len(decoder_layers(model)) - 1,
            "normed": False,
            "template": template_hash(tokenizer, chat),
        }
        return self

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: bool = True) -> None:
        """Refuse a model or template that it was not trained for."""
        width = model.config.get_text_config().hidden_size
        if width != self.hidden_size:
            raise InputError(
                f"the probe reads states of width {self.hidden_size}, the model has {width}; train a probe for it"
            )
        if self.made_for is None:
            return
        self.check_made_for(fingerprint(model))
        made, found = self.made_for["template"], template_hash(tokenizer, chat)
        if found != made:
            raise InputError(
                f"the probe was trained after another chat template ({made}, here {found}); use the same tokenizer and "
                "the same `chat`, or train again"
            )

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        sizes = {"hidden_size": self.hidden_size, "hidden": self.hidden, "n_classes": self.n_classes}
        return self.state_dict(), {**sizes, "held_out_accuracy": self.held_out_accuracy, "made_for": self.made_for}

    @classmethod
    def restored(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> DifficultyProbe:
        sizes = header["hidden_size"], header["hidden"], header["n_classes"]
        probe = with_weights(lambda: cls(*sizes), tensors)
        probe.held_out_accuracy, probe.made_for = float(header["held_out_accuracy"]), header["made_for"]
        return probe
