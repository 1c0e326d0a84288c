"""LM-head neurons: read every MLP neuron's weight vector as if it were a hidden state, and name it after its top token.

Paper: Decoding specialized feature neurons in LLMs with the final projection layer, arXiv 2501.02688. A name says
what a neuron reads along in the residual stream, not what it writes; `clamp_effect` is where causes are tested.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Annotated, Any, ClassVar, cast

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Count, Entries, Layer, Probability
from ..core.method import read_words
from ..core.progress import Progress
from ..hooks.neurons import clamp_neurons
from ..models.anatomy import unembedding
from ..models.load import Loaded
from ..text.words import listed
from ..trace.trace import Trace, capture
from .contract import Fitted, Reading, ReadMethod
from .weights.directions import Side, neuron_rows, top_tokens
from .weights.neuron_map import NeuronMap

__all__ = ["LMHeadNeurons", "clamp_effect"]


class LMHeadNeurons(ReadMethod):
    """Name MLP neurons after the tokens their weights point at; find them by word, and in a trace.

        names = LMHeadNeurons().map(model, tokenizer)
        names.find("dog"); names.table(layer=28)
        LMHeadNeurons().read("She stayed at home", names, (model, tokenizer)).to_frame()

    The paper decodes the raw rows of the up-projection; `gate` and `down` decode the other two sides.
    """

    slug: ClassVar[str] = "lm-head-neurons"
    title: ClassVar[str] = "LM-head neuron map"
    paper: ClassVar[str] = (
        "Decoding specialized feature neurons in LLMs with the final projection layer, arXiv 2501.02688"
    )
    claim: ClassVar[str] = (
        "MLP neurons whose up-projection points at one token are features of that token: clamping them moves it more "
        "than clamping other neurons does."
    )
    published: ClassVar[Claim] = Claim(
        "75 %", "of neurons keep their top token after instruction tuning", "Llama-3.1-8B"
    )

    takes: ClassVar = ("text", "trace")
    artifact: ClassVar[type] = NeuronMap
    saved_as: ClassVar = "file"
    fit_options: ClassVar[tuple[str, ...]] = ("side", "fold_norm", "top_k", "chunk", "bottom")
    input_options: ClassVar[tuple[str, ...]] = ("min_prob", "per_token")

    side: Side = Field(default="up", description="weights to decode: what a neuron reads (up, gate) or writes (down)")
    fold_norm: bool = Field(
        default=False, description="multiply by the gain of the norm between the residual and the weights"
    )
    top_k: Entries = Field(default=10, description="tokens kept per neuron; at most the vocabulary")
    chunk: Count = Field(default=512, description="neurons decoded at a time")
    bottom: bool = Field(
        default=False, description="also the tokens a neuron points away from, for negative activations"
    )
    find: Annotated[tuple[str, ...], BeforeValidator(read_words)] = Field(
        default=(), description="words whose neurons are listed, with commas between or a JSON list"
    )
    layer: Layer | None = Field(default=None, description="layer whose most specialized neurons are listed")
    overlap: str | None = Field(
        default=None, description="saved map of another checkpoint, with which names are compared layer by layer"
    )
    min_prob: Probability = Field(
        default=0.01, description="probability of its top token from which a neuron has a name"
    )
    per_token: Count = Field(default=3, description="named neurons listed of each token that is read")

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

    def fit(self, loaded: Loaded, data: None = None, progress: Progress | None = None) -> Fitted:
        """The map as an artifact, see `map`."""
        names = self.map(*loaded, progress)
        layers, width = names.shape
        return Fitted(names, [], f"{layers * width:,} neurons in {layers} layers")

    def load(self, path: str, loaded: Loaded) -> NeuronMap:
        """See `NeuronMap.load`."""
        return NeuronMap.load(path, *loaded)

    def browse(self, artifact: NeuronMap) -> list[Reading]:
        """The neurons of the words of `find`, those of `layer`, and how many names `overlap` has in common."""
        readings = [artifact.find(word) for word in self.find]
        if self.layer is not None:
            readings.append(artifact.table(self.layer))
        if self.overlap is not None:
            readings.append(_overlap(artifact, NeuronMap.load(self.overlap)))
        return readings

    def read(self, given: str | Trace, artifact: NeuronMap | None = None, loaded: Loaded | None = None) -> Reading:
        """The strongest named neurons of every token, by the size of their activation (the input of `mlp.down_proj`).

        Args:
            given: a text, or a trace that was captured with `neurons=...`.
            artifact: a map of the model; made anew if not given.
            loaded: the model and its tokenizer, for a text or a new map.

        Returns:
            Rows of position, token, layer, neuron, activation, name, probability; fewer than `per_token` where fewer
            are named.

        Raises:
            InputError: a trace without neurons, a map of another model, a text or no map without the model.
        """
        if loaded is None and (artifact is None or isinstance(given, str)):
            raise InputError("a text, or names without a map, need the model and a tokenizer; give loaded=load(...)")
        if isinstance(given, Trace) and not _layers(given):
            raise InputError('this trace does not hold neurons; capture again with neurons="all" or neurons=[layer]')
        live = cast(Loaded, loaded)  # where it is needed, it is there
        names = self.map(*live) if artifact is None else artifact
        trace = self._traced(given, names, live) if isinstance(given, str) else given
        names.check_made_for(trace.header["fingerprint"])
        rows = []
        for position, found in enumerate(_strongest(trace, names, self.per_token, self.min_prob)):
            start, stop = trace.offsets[position].tolist() if trace.text else (0, 0)
            token = trace.text[start:stop] or f"<{int(trace.ids[position])}>"
            rows += [{"position": position, "token": token, **_named(names, *neuron)} for neuron in found]
        return Reading(f"strongest of the neurons whose name has a probability of at least {self.min_prob:g}", rows)

    def _traced(self, text: str, names: NeuronMap, loaded: Loaded) -> Trace:
        """The text with the neurons of the layers in which some have a name."""
        if not text.strip():
            raise InputError("the text is empty; give some text to read")
        model, tokenizer = loaded
        ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        neurons = names.named_layers(self.min_prob) or "all"
        with capture(model, tokenizer, neurons=neurons) as cap, torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)
        return cap.trace


def _named(names: NeuronMap, layer: int, neuron: int, activation: float) -> dict[str, Any]:
    return {
        "layer": layer,
        "neuron": neuron,
        "activation": activation,
        "name": names.text(names.top[layer, neuron]),
        "probability": float(names.probability[layer, neuron]),
    }


def _overlap(names: NeuronMap, other: NeuronMap) -> Reading:
    found = names.overlap(other)
    title = f"equal top tokens: {found.share:.1%} of all neurons, {found.chance:.1%} by chance"
    return Reading(title, [{"layer": i, "share": a, "chance": b} for i, (a, b) in enumerate(found.by_layer)])


def _layers(trace: Trace) -> list[int]:
    """Layers whose neurons a trace holds."""
    return sorted(int(name.removeprefix("mlp.")) for name in trace.tensors if name.startswith("mlp."))


def _strongest(trace: Trace, names: NeuronMap, top: int, min_prob: float) -> list[list[tuple[int, int, float]]]:
    """For every token the `top` (layer, neuron, activation) of largest size among the named neurons."""
    sizes, places, signed = [], [], []
    for layer in _layers(trace):
        values = trace.neurons(layer).float()
        named = (names.probability[layer] >= min_prob).nonzero().squeeze(1)
        best = values[:, named].abs().topk(min(top, len(named)))
        neurons = named[best.indices]
        sizes.append(best.values)
        signed.append(values.gather(1, neurons))
        places.append(layer * names.shape[1] + neurons)
    sizes, places, signed = (torch.cat(parts, 1) for parts in (sizes, places, signed))
    order = sizes.topk(min(top, sizes.shape[1])).indices
    chosen = zip(places.gather(1, order).tolist(), signed.gather(1, order).tolist())
    width = names.shape[1]
    return [[(p // width, p % width, v) for p, v in zip(*row)] for row in chosen]


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
