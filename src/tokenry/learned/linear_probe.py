"""A linear probe: how strongly a state says yes to one question, as a direction and a threshold.

Trained by the stage read (see `refusal-cliff`, Refusal Falls off a Cliff, arXiv 2510.06036), and for any other binary
property of hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..core.artifact import Artifact, Folder, Header, MadeFor
from ..core.errors import InputError
from ..core.tensors import with_weights
from ..models.anatomy import decoder_layers, fingerprint
from ..trace.trace import Trace

__all__ = ["LEAST", "LinearProbe"]

LEAST = 10  # examples of each class


class ProbeHeader(Header):
    """What a saved probe says of itself."""

    hidden_size: int = Field(ge=1, lt=2**24)
    layer: int = Field(ge=0, lt=2**16)
    held_out_accuracy: float = Field(allow_inf_nan=True)  # nan before it was trained
    made_for: MadeFor


class LinearProbe(Artifact, nn.Module):
    """sigmoid(w . h + b) of states h.

    Args:
        hidden_size: width of the model.
        layer: which state is read, as `Trace.hidden` counts: 0 the embeddings, i what the i-th block writes, before
            the last norm; negative from the end until the probe is bound.

    `held_out_accuracy` is that of the examples `fit` kept back; `made_for` says for which model (see `bind`).
    """

    kind = "linear probe"
    layout = Folder("probe.safetensors", "probe.json")
    fields: ClassVar[type[Header]] = ProbeHeader
    remedy = "give a folder written by LinearProbe.save"

    def __init__(self, hidden_size: int, layer: int = -1) -> None:
        super().__init__()
        if hidden_size < 1:
            raise InputError(f"hidden_size={hidden_size} is not allowed; give the width of the model, at least 1")
        self.hidden_size, self.layer = hidden_size, layer
        self.linear = nn.Linear(hidden_size, 1)
        self.held_out_accuracy = float("nan")
        self.made_for: dict[str, Any] | None = None

    @property
    def direction(self) -> Tensor:
        """w (hidden_size,)."""
        return self.linear.weight.detach()[0]

    def forward(self, states: Tensor) -> Tensor:
        """Logits (...) of states (..., hidden_size)."""
        if states.shape[-1] != self.hidden_size:
            raise InputError(
                f"the probe reads states of width {self.hidden_size}, not {states.shape[-1]}; use one of this model"
            )
        weight = self.linear.weight
        return self.linear(states.to(weight.device, torch.float32))[..., 0]

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """w . h + b (...) of states h (..., hidden_size), without gradients."""
        return self(states)

    def probabilities(self, states: Tensor) -> Tensor:
        """The sigmoid of `logits`."""
        return self.logits(states).sigmoid()

    def curve(self, trace: Trace) -> Tensor:
        """The probability (T,) at every token of a trace that holds the probe's state.

        Raises:
            InputError: a trace of another model, or without the state.
        """
        self.check_made_for(trace.header["fingerprint"])
        return self.probabilities(trace.hidden(self.layer))

    def fit(
        self,
        states: Tensor,
        labels: Sequence[int] | Tensor,
        *,
        learning_rate: float = 1e-3,
        epochs: int = 5,
        batch_size: int = 64,
        held_out: float = 0.2,
        seed: int = 0,
    ) -> LinearProbe:
        """Train on states (n, hidden_size) and labels (n,) of 0 and 1, from a fresh start: binary cross-entropy, Adam,
        the first epoch that is best on the examples held out.

        Raises:
            InputError: fewer than 10 examples of a class, labels that are neither 0 nor 1, states that are not finite.
        """
        states, labels = states.detach().cpu().float(), torch.as_tensor(labels)
        check_examples(states, labels)
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(labels), generator=draw)
        kept_back, used = order.split([int(held_out * len(order)), len(order) - int(held_out * len(order))])
        judged = kept_back if len(kept_back) else used
        self._restart(seed)
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate)
        best, weights = -1.0, self.state_dict()
        for _ in range(epochs):
            for batch in used[torch.randperm(len(used), generator=draw)].split(batch_size):
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(self(states[batch]), labels[batch].float()).backward()
                optimizer.step()
            accuracy = self.accuracy(states[judged], labels[judged])
            if accuracy > best:
                best, weights = accuracy, {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.load_state_dict(weights)
        self.held_out_accuracy = best if len(kept_back) else float("nan")
        return self

    def fit_means(self, states: Tensor, labels: Sequence[int] | Tensor) -> LinearProbe:
        """Without training: the difference of the classes' means, its length such that these lie at -1 and 1."""
        states, labels = states.detach().cpu().float(), torch.as_tensor(labels)
        check_examples(states, labels)
        yes, no = states[labels == 1].mean(0), states[labels == 0].mean(0)
        weight = (yes - no) * 2 / (yes - no).square().sum().clamp(min=1e-12)
        with torch.no_grad():
            self.linear.weight.copy_(weight[None])
            self.linear.bias.copy_(-(weight @ (yes + no) / 2)[None])
        return self

    def accuracy(self, states: Tensor, labels: Tensor) -> float:
        """Share of states (n, hidden_size) on the right side of the threshold."""
        return float(((self.logits(states).cpu() > 0) == (labels == 1)).float().mean())

    def _restart(self, seed: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.linear.reset_parameters()

    # --- whom it belongs to ------------------------------------------------------------------------------------------

    def bind(self, model: PreTrainedModel) -> LinearProbe:
        """Say that it reads states of `model`, and which one.

        Raises:
            InputError: another width, or a layer that the model does not have.
        """
        self._check_width(model)
        self.layer = state_number(model, self.layer)
        self.made_for = {"model": model.config._name_or_path, "fingerprint": fingerprint(model)}
        return self

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that it was not trained for."""
        self._check_width(model)
        if self.made_for is not None:
            self.check_made_for(fingerprint(model))

    def _check_width(self, model: PreTrainedModel) -> None:
        width = model.config.get_text_config().hidden_size
        if width != self.hidden_size:
            raise InputError(
                f"the probe reads states of width {self.hidden_size}, the model has {width}; train a probe for it"
            )

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        about = {"hidden_size": self.hidden_size, "layer": self.layer}
        return self.state_dict(), {**about, "held_out_accuracy": self.held_out_accuracy, "made_for": self.made_for}

    @classmethod
    def restored(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> LinearProbe:
        probe = with_weights(lambda: cls(header["hidden_size"], header["layer"]), tensors)
        probe.held_out_accuracy, probe.made_for = float(header["held_out_accuracy"]), header["made_for"]
        return probe


def state_number(model: PreTrainedModel, layer: int) -> int:
    """The number of a hidden state, 0 to the number of blocks, counted from the end if negative."""
    depth = len(decoder_layers(model))
    if not -depth - 1 <= layer <= depth:
        raise InputError(f"layer={layer} is not allowed; give 0 (embeddings) to {depth}, or -1 for the last")
    return layer % (depth + 1)


def check_examples(states: Tensor, labels: Tensor) -> None:
    """Refuse what a probe cannot be trained on."""
    if states.dim() != 2 or labels.dim() != 1 or len(states) != len(labels) or not bool(states.isfinite().all()):
        raise InputError(
            f"states {tuple(states.shape)} for {len(labels)} labels are not allowed; give a finite state (width,) for "
            "each label"
        )
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise InputError(f"labels {sorted(set(labels.tolist()))[:5]} are not allowed; give 0 (no) and 1 (yes)")
    for value, count in enumerate((len(labels) - int(labels.sum()), int(labels.sum()))):
        if count < LEAST:
            raise InputError(f"{count} examples have the label {value}; give at least {LEAST} of each class")
