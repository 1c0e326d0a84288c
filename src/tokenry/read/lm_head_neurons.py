"""LM-head neurons: read every MLP neuron's weight vector as if it were a hidden state, and name it after its top token.

Paper: Decoding specialized feature neurons in LLMs with the final projection layer, arXiv 2501.02688. A name says
what a neuron reads along in the residual stream, not what it writes; `clamp_effect` is where causes are tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.fields import Count, Entries
from ..core.method import Method
from ..hooks.neurons import clamp_neurons
from ..models.anatomy import unembedding
from ..text.words import listed
from ..trace.trace import Trace
from .contract import Reading
from .weights.directions import Side, neuron_rows, top_tokens
from .weights.neuron_map import NeuronMap, Progress

__all__ = ["LMHeadNeurons", "clamp_effect"]


class LMHeadNeurons(Method):
    """Name MLP neurons after the tokens their weights point at; find them by word, and in a trace.

        names = LMHeadNeurons().map(model, tokenizer)
        names.find("dog"); names.table(layer=28)
        with capture(model, tokenizer, neurons="all") as cap:
            model(ids, use_cache=False, logits_to_keep=1)
        LMHeadNeurons().read(cap.trace, names).to_frame()

    The paper decodes the raw rows of the up-projection; `gate` and `down` decode the other two sides.
    """

    slug: ClassVar[str] = "lm-head-neurons"
    stage: ClassVar[str] = "read"
    title: ClassVar[str] = "LM-head neuron map"
    paper: ClassVar[str] = (
        "Decoding specialized feature neurons in LLMs with the final projection layer, arXiv 2501.02688"
    )
    claim: ClassVar[str] = (
        "MLP neurons whose up-projection points at one token are features of that token: clamping them moves it more "
        "than clamping other neurons does."
    )

    side: Side = Field("up", description="weights to decode: what a neuron reads (up, gate) or writes (down)")
    fold_norm: bool = Field(False, description="multiply by the gain of the norm between the residual and the weights")
    top_k: Entries = Field(10, description="tokens kept per neuron; at most the vocabulary")
    chunk: Count = Field(512, description="neurons decoded at a time")
    bottom: bool = Field(False, description="also the tokens a neuron points away from, for negative activations")

    def map(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, progress: Progress | None = None
    ) -> NeuronMap:
        """Decode every neuron of `model`. Needs no data and no forward pass.

        Args:
            progress: called with (layers done, layers, what is done).

        Raises:
            InputError: no gated MLP, a mixture of experts, quantized weights, a top_k above the vocabulary.
        """
        return NeuronMap.from_model(
            model, tokenizer, self.side, self.fold_norm, self.top_k, self.chunk, self.bottom, progress
        )

    def read(
        self,
        trace: Trace,
        names: NeuronMap | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        top: int = 3,
        least: float = 0.01,
    ) -> Reading:
        """The strongest named neurons of every token of a trace that was captured with `neurons=...`.

        Args:
            names: a map of the traced model; made anew from `trace.model` and `tokenizer` if not given.
            top: neurons per token, by the size of their activation (the input of `mlp.down_proj`).
            least: a neuron has a name if its top token has at least this probability; most neurons have none.

        Returns:
            Rows of position, token, layer, neuron, activation, name, probability; fewer than `top` where fewer are
            named.

        Raises:
            InputError: a trace without neurons, a map of another model, neither map nor model and tokenizer.
        """
        if top < 1 or not 0 <= least <= 1:
            raise InputError(f"top={top}, least={least} is not allowed; give top >= 1 and a probability in [0, 1]")
        layers = sorted(int(name.removeprefix("mlp.")) for name in trace.tensors if name.startswith("mlp."))
        if not layers:
            raise InputError('this trace does not hold neurons; capture again with neurons="all" or neurons=[layer]')
        if names is None:
            if trace.model is None or tokenizer is None:
                raise InputError("names of neurons need a map, or the traced model and a tokenizer; give one of them")
            names = self.map(trace.model, tokenizer)
        names.check_made_for(trace.header["fingerprint"])
        rows = []
        for position, found in enumerate(_strongest(trace, layers, names, top, least)):
            start, stop = trace.offsets[position].tolist() if trace.text else (0, 0)
            token = trace.text[start:stop] or f"<{int(trace.ids[position])}>"
            for layer, neuron, activation in found:
                rows.append(
                    {
                        "position": position,
                        "token": token,
                        "layer": layer,
                        "neuron": neuron,
                        "activation": activation,
                        "name": names.text(names.top[layer, neuron]),
                        "probability": float(names.probability[layer, neuron]),
                    }
                )
        return Reading(f"strongest of the neurons whose name has a probability of at least {least:g}", rows)


def _strongest(
    trace: Trace, layers: Sequence[int], names: NeuronMap, top: int, least: float
) -> list[list[tuple[int, int, float]]]:
    """For every token the `top` (layer, neuron, activation) of largest size among the named neurons."""
    sizes, places, signed = [], [], []
    for layer in layers:
        values = trace.neurons(layer).float()
        named = (names.probability[layer] >= least).nonzero().squeeze(1)
        best = values[:, named].abs().topk(min(top, len(named)))
        neurons = named[best.indices]
        sizes.append(best.values)
        signed.append(values.gather(1, neurons))
        places.append(layer * names.shape[1] + neurons)
    sizes, places, signed = (torch.cat(parts, 1) for parts in (sizes, places, signed))
    order = sizes.topk(min(top, sizes.shape[1])).indices
    chosen = zip(places.gather(1, order).tolist(), signed.gather(1, order).tolist())
    return [[(*divmod(p, names.shape[1]), v) for p, v in zip(*row)] for row in chosen]


@torch.no_grad()
def clamp_effect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    neuron: tuple[int, int],
    values: Sequence[float],
) -> Reading:
    """What clamping a neuron's up-projection does to its own token as the next one.

    Args:
        prompts: each gives one distribution, after its last token; the clamp acts at all of its positions.
        neuron: (layer, neuron).
        values: what the up-projection is set to, one clamp after the other.

    Returns:
        Rows of prompt, value, token, its log-probability in the plain model, the change of it in nats, and the most
        likely tokens of both.

    Raises:
        InputError: no such neuron, no prompts or values, an empty prompt, a value that is not finite.
    """
    layer, index = neuron
    prompts = listed(prompts, "prompt")
    if not prompts or not values or not all(isfinite(v) for v in values):
        raise InputError(f"{len(prompts)} prompts and values {list(values)} measure nothing; give finite numbers")
    clamp_neurons(model, {layer: {index: 0.0}}, side="up")  # refuses a neuron that does not exist
    row = neuron_rows(model, layer)[index : index + 1]
    token = int(top_tokens(row, unembedding(model), 1).ids)
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        if not ids.shape[1]:
            raise InputError(f"the prompt {prompt!r} has no tokens; give some text")
        plain = _next_logprobs(model, ids)
        for value in values:
            with clamp_neurons(model, {layer: {index: value}}, side="up"):
                clamped = _next_logprobs(model, ids)
            rows.append(
                {
                    "prompt": prompt,
                    "value": value,
                    "token": tokenizer.decode([token]),
                    "logprob": float(plain[token]),
                    "change": float(clamped[token] - plain[token]),
                    "plain_next": tokenizer.decode(plain.argmax()),
                    "clamped_next": tokenizer.decode(clamped.argmax()),
                }
            )
    return Reading(f"clamping neuron {index} of layer {layer}", rows)


def _next_logprobs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float().log_softmax(-1)
