"""The task `clamp`: how far does holding a neuron at a value move the log-probability of a token?"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...hooks.residual import edit_inputs, edit_outputs
from ...models.anatomy import decoder_layers, down_projection, effective_weight, gated_mlp, unembedding
from ...read.lm_head_neurons import LMHeadNeurons
from ...read.weights.directions import neuron_rows, top_tokens
from ..task import Arm, Metric, Outcome, Sample

__all__ = ["PROMPTS", "ClampTask", "Target", "named_neurons"]

PROMPTS = (
    "The old man walked down to the river because",
    "In the morning the children went to school with their",
    "My favorite animal is the",
    "The results of the experiment show that the",
    "She opened the letter and read the first",
    "Add the flour to the bowl and stir",
    "The government said on Monday that it would",
    "To solve this equation we first",
)


class Target(NamedTuple):
    """A neuron, and the token whose log-probability is watched."""

    layer: int
    neuron: int
    token: int


Picks = Callable[[Sample, int], Target]


@torch.no_grad()
def named_neurons(model: PreTrainedModel, layers: Sequence[int], count: int, method: LMHeadNeurons) -> list[Target]:
    """`count` neurons whose top token has the highest probability in their layer, with that token, layers in turns."""
    found = []
    for layer in layers:
        best = top_tokens(neuron_rows(model, layer, method.side, method.fold_norm), unembedding(model), 1)
        probability = (best.logits[:, 0] - best.lse).exp()
        order = probability.argsort(descending=True)[: -(-count // len(layers))].tolist()
        found.append([Target(layer, neuron, int(best.ids[neuron, 0])) for neuron in order])
    return [target for turn in zip(*found) for target in turn][:count]


class Plain(NamedTuple):
    """A prompt in the plain model: ids (1, T), next-token log-probabilities (vocab,), inputs of MLPs (T, width)."""

    ids: Tensor
    logprobs: Tensor
    inputs: dict[int, Tensor]


class ClampTask:
    """A sample is a named neuron, a seed is a prompt. Every arm holds a neuron's up-projection at +value, then at
    -value, at all positions, and watches one token as the next one.

    An arm's `apply` is `apply(sample, seed)`, which says which neuron and which token, or None: the sample's own
    neuron is held at what it has anyway, which must change nothing. All clamps of a batch are rows of one forward.
    """

    slug: ClassVar[str] = "clamp"
    stage: ClassVar[str] = "read"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("effect", "higher", "size of the change of the token's log-probability in nats, mean of both clamps"),
        Metric("slope", None, "half the change at +value minus the change at -value, in nats"),
        Metric("first_order", None, "value * act(gate) * (unembedding row . down column) at the last position"),
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        named: Sequence[Target],
        value: float = 20.0,
    ) -> None:
        self.model, self.tokenizer, self.value = model, tokenizer, value
        self.setting = {"value": value}
        self.named = list(named)
        self._plain: dict[int, Plain] = {}

    def samples(self) -> list[Sample]:
        made = []
        for target in self.named:
            text = f"{self.tokenizer.decode([target.token])!r}: layer {target.layer}, neuron {target.neuron}"
            made.append(Sample(f"{target.layer}.{target.neuron}", text, {"target": target}))
        return made

    def own_token(self, sample: Sample, seed: int) -> Target:
        """The sample's neuron and its token."""
        return sample.data["target"]

    def random_neuron(self, sample: Sample, seed: int) -> Target:
        """Another neuron of the sample's layer, drawn for each prompt; none of the named ones."""
        layer, _, token = sample.data["target"]
        taken = {t.neuron for t in self.named if t.layer == layer}
        free = [j for j in range(cast(int, down_projection(self.model, layer).in_features)) if j not in taken]
        return Target(layer, random.Random(f"{sample.id} {seed}").choice(free), token)

    def other_token(self, sample: Sample, seed: int) -> Target:
        """The sample's neuron with the token of another named neuron, of the same layer if possible."""
        target = sample.data["target"]
        others = [t for t in self.named if t.token != target.token]
        if not others:
            raise InputError("all named neurons have one token; compare more samples")
        near = [t for t in others if t.layer == target.layer] or others
        return target._replace(token=random.Random(f"token {sample.id} {seed}").choice(near).token)

    @torch.no_grad()
    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        start = time.perf_counter()
        pick: Picks = arm.apply or self.own_token
        targets, plain, values = [pick(sample, seed) for sample in samples], self._plain_run(seed), []
        for target in targets:
            own = self._side("up", target, plain)
            ends = (own, own) if arm.apply is None else (self.value, -self.value)
            values += [torch.as_tensor(end).to(own).expand(len(own)) for end in ends]
        logprobs = self._clamped(plain.ids, [target for target in targets for _ in range(2)], torch.stack(values))
        cost = {
            "seconds": (time.perf_counter() - start) / len(samples),
            "forward_passes": 1 / len(samples),
            "tokens_processed": 2 * plain.ids.shape[1],
        }
        outcomes = []
        for i, target in enumerate(targets):
            high, low = (logprobs[2 * i : 2 * i + 2, target.token] - plain.logprobs[target.token]).tolist()
            metrics = {
                "effect": (abs(high) + abs(low)) / 2,
                "slope": (high - low) / 2,
                "first_order": self._first_order(target, plain),
            }
            outcomes.append(Outcome(metrics, cost, self._shown(target, high, low, seed)))
        return outcomes

    def _shown(self, target: Target, high: float, low: float, seed: int) -> dict[str, Any]:
        token = self.tokenizer.decode([target.token])
        what = f"neuron {target.neuron}, token {token!r}"
        moved = f"{high:+.2f} nats at {self.value:g}, {low:+.2f} at {-self.value:g}"
        return {"note": f"{PROMPTS[seed % len(PROMPTS)]} ... {what}: {moved}"}

    def _plain_run(self, seed: int) -> Plain:
        """The prompt of a seed in the plain model; all arms share it."""
        if seed not in self._plain:
            ids = self.tokenizer(PROMPTS[seed % len(PROMPTS)], return_tensors="pt").input_ids.to(self.model.device)
            inputs: dict[int, Tensor] = {}
            layers = {t.layer for t in self.named}
            watch = {self._mlp(i): lambda x, i=i: inputs.update({i: x[0].detach()}) or x for i in layers}
            with edit_inputs(self.model, watch):
                logprobs = self._next(ids)[0]
            self._plain[seed] = Plain(ids, logprobs, inputs)
        return self._plain[seed]

    def _mlp(self, layer: int) -> Any:
        return decoder_layers(self.model)[layer].mlp

    def _side(self, side: Literal["gate", "up"], target: Target, plain: Plain) -> Tensor:
        """What one input side of the neuron gives at every position of the prompt (T,)."""
        projection = gated_mlp(self.model, target.layer)[side]
        return projection.module(plain.inputs[target.layer])[:, projection.outputs][:, target.neuron]

    def _first_order(self, target: Target, plain: Plain) -> float:
        mlp = self._mlp(target.layer)
        activate = getattr(mlp, "act_fn", None) or mlp.activation_fn  # the second is Phi-3's
        down = effective_weight(down_projection(self.model, target.layer), "mlp.down_proj")
        column = down[:, target.neuron]
        gate = activate(self._side("gate", target, plain)[-1])
        return self.value * float(gate) * float(unembedding(self.model)[target.token].float() @ column.float())

    def _clamped(self, ids: Tensor, targets: Sequence[Target], values: Tensor) -> Tensor:
        """Next-token log-probabilities (rows, vocab); in row r neuron targets[r] is held at values[r] (columns,)."""

        def hold(layer: int, first: int) -> Callable[[Tensor], Tensor]:
            mine = [r for r, target in enumerate(targets) if target.layer == layer]
            columns = [first + targets[r].neuron for r in mine]

            def edit(u: Tensor) -> Tensor:
                u = u.clone()
                u[mine, :, columns] = values[mine]
                return u

            return edit

        ups = {layer: gated_mlp(self.model, layer)["up"] for layer in {t.layer for t in targets}}
        edits = {up.module: hold(layer, up.outputs.start) for layer, up in ups.items()}
        with edit_outputs(self.model, edits):
            return self._next(ids.expand(len(targets), -1))

    def _next(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
