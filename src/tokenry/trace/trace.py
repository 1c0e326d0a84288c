"""Trace: what happened to each token of one sequence. What `read` and `judge` take.

    with capture(model, tokenizer, hidden=[-1, 15], qk="all", reducers=[TopKeys(8)]) as cap:
        model(ids, use_cache=False, logits_to_keep=1)       # or model.generate(...)
    trace = cap.trace
    trace.logits([5]); trace.attention(layer=5, heads=[0, 4], rows=slice(100, 200)); trace.hidden(15)
    trace.save("t.safetensors"); Trace.load("t.safetensors", model)

Nothing of size time x time or time x vocabulary is stored or ever exists whole: logits come from the final hidden
state, attention maps from queries and keys, both for the rows that are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, Strict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.artifact import Header, header_of
from ..core.errors import InputError
from ..core.files import explained, parse_json
from ..core.outputs import write_file
from ..core.schemas import Fields
from ..core.tensors import check_floats, check_range, check_tensors, read_tensors
from ..hooks.attention import observe
from ..hooks.holding import hold, hooked
from ..hooks.residual import capture_residual, edit_inputs, on_feed
from ..models.anatomy import decoder_body, decoder_layers, down_projection, head_mixer
from ..text.spans import Span, find_spans
from .recorder import FORMAT, Recorder, head_logits, identity
from .reducers import Reducer

__all__ = ["Captured", "Trace", "capture"]

Rows = slice | Sequence[int] | Tensor | None


Count = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[tuple[Count, Count], Strict(False)]


class Spans(Fields):
    """Half-open token spans by role."""

    prompt: list[Tokens]
    think: list[Tokens]
    answer: list[Tokens]
    sentences: list[Tokens]


class Setting(Fields):
    """How the attention maps of a layer are rebuilt."""

    edited: bool
    scaling: float = Field(gt=0, lt=1e6)
    window: Count | None


class TraceHeader(Header):
    """What a saved trace says of itself."""

    model: str
    config: str
    fingerprint: str
    tokenizer: str | None
    dtype: str
    depth: int = Field(ge=1, lt=2**16)
    attention: dict[str, Setting]
    text: str
    spans: Spans


class Trace:
    """One sequence without padding, T tokens that were fed to the model.

    Attributes:
        tensors: everything stored, by name.
        header: model name, fingerprint and hashes, dtype, text, spans; JSON-compatible.
        spans: half-open token spans: "prompt", "think", "answer", "sentences".
        model: where `logits` come from; None if loaded without one.
    """

    def __init__(self, tensors: dict[str, Tensor], header: dict, model: PreTrainedModel | None = None) -> None:
        self.tensors, self.header, self.model = tensors, header, model
        self.spans: dict[str, list[Span]] = {k: [(a, b) for a, b in v] for k, v in header["spans"].items()}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def ids(self) -> Tensor:
        """(T,) token ids."""
        return self.tensors["ids"]

    @property
    def position_ids(self) -> Tensor:
        """(T,) positions the model used."""
        return self.tensors["position_ids"]

    @property
    def logprob(self) -> Tensor:
        """(T,) log-probability of each token given those before it, in nats; the first is nan."""
        return self.tensors["logprob"]

    @property
    def entropy(self) -> Tensor:
        """(T,) entropy in nats of the distribution each token was drawn from; the first is nan."""
        return self.tensors["entropy"]

    @property
    def lse(self) -> Tensor:
        """(T,) log-sum-exp of the logits each token was drawn from; the first is nan."""
        return self.tensors["lse"]

    @property
    def text(self) -> str:
        """The decoded tokens, special tokens included; empty without a tokenizer."""
        return self.header["text"]

    @property
    def offsets(self) -> Tensor:
        """(T, 2) characters of `text` that each token stands for; tokens that share a character share offsets."""
        return self._get("offsets", "the text of tokens", "tokenizer=...")

    @property
    def reduced(self) -> dict[str, Tensor]:
        """What the reducers kept, by name."""
        return {k.removeprefix("reduced."): t for k, t in self.tensors.items() if k.startswith("reduced.")}

    @property
    def roles(self) -> list[str]:
        """The role of each token: "prompt", "think" or "answer"."""
        roles = [""] * len(self)
        for role in ("prompt", "think", "answer"):
            for start, stop in self.spans[role]:
                roles[start:stop] = [role] * (stop - start)
        return roles

    def with_prompt(self, length: int) -> Trace:
        """The same trace with the spans that follow when the first `length` tokens are the prompt."""
        if not 0 <= length <= len(self):
            raise InputError(f"a prompt of {length} tokens is not allowed; this trace has {len(self)} tokens")
        starts = self.offsets[:, 0].contiguous() if self.text else None
        spans = find_spans(self.text, starts, len(self), length)
        return Trace(self.tensors, {**self.header, "spans": spans}, self.model)

    def hidden(self, layer: int | Literal["final"]) -> Tensor:
        """Hidden states (T, width): "final" after the norm, or resid[layer], 0 the embeddings, L (or -1) the last."""
        if layer == "final":
            return self.tensors["final"]
        depth = self.header["depth"]
        return self._get(f"resid.{_state(layer, depth)}", f"the hidden state {layer}", f"hidden=[{layer}]")

    def logits(self, rows: Rows = None) -> Tensor:
        """Logits (rows, vocab) in float32 after chosen tokens: row t predicts token t + 1."""
        if self.model is None:
            raise InputError("logits need the model; give it to Trace.load(path, model)")
        final = self.tensors["final"][_index(rows, len(self))]
        return head_logits(self.model, final.to(self.model.device)).cpu()

    def attention(self, layer: int, heads: Sequence[int] | None = None, rows: Rows = None) -> Tensor:
        """Attention probabilities (heads, rows, T) in float32, rebuilt from queries and keys."""
        asked = f'qk=[{layer}] or qk="all"'
        query, key = (self._get(f"{n}.{layer}", f"attention of layer {layer}", asked).float() for n in "qk")
        setting = self.header["attention"][str(layer)]
        if setting["edited"]:
            raise InputError(f"the mask of layer {layer} was edited during the capture; record rows with a reducer")
        picked = _index(rows, len(self))
        wanted = torch.arange(query.shape[1]) if heads is None else torch.as_tensor(heads)
        key = key[:, wanted // (query.shape[1] // key.shape[1])]  # query head h reads key head h // group
        scores = torch.einsum("rhd,khd->hrk", query[picked][:, wanted], key) * setting["scaling"]
        back = picked[:, None] - torch.arange(len(self))
        seen = (back >= 0) & (back < (setting["window"] or len(self)))
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)

    def head_outputs(self, layer: int) -> Tensor:
        """Outputs (positions, heads, head_dim) of each head before o_proj, at `tensors["positions"]`."""
        return self._get(f"heads.{layer}", f"head outputs of layer {layer}", "head_outputs=[position, ...]")

    def neurons(self, layer: int) -> Tensor:
        """Activations (T, neurons) of an MLP: the inputs of `mlp.down_proj`."""
        return self._get(f"mlp.{layer}", f"neurons of layer {layer}", f"neurons=[{layer}]")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file with a JSON header."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        metadata = {"tokenry": json.dumps({**self.header, "spans": self.spans})}
        write_file(path, lambda part: save_file(tensors, part, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel | None = None) -> Trace:
        """Read a file written by `save`. With `model`, which must be the one that was traced, logits work too.

        Raises:
            InputError: not a trace, a newer format, or another model.
        """
        remedy = "give a file written by Trace.save"
        with explained(f"{str(path)!r} cannot be read as a trace", remedy):
            tensors, texts = read_tensors(path)
            header = parse_json(texts.get("tokenry", "null"))
        if header is None:
            raise InputError(f"{str(path)!r} has no trace header; {remedy}")
        with explained(f"{str(path)!r} cannot be read as a trace", remedy):
            _check(tensors, header_of(header, TraceHeader, FORMAT, f"the trace {str(path)!r}"))
        trace = cls(tensors, header, model)
        if model is not None:
            trace.check_model(model, repr(str(path)))
        return trace

    def check_model(self, model: PreTrainedModel, what: str = "the trace") -> None:
        """Refuse another model than the one that it was captured on."""
        header = self.header
        if identity(model) != [header["fingerprint"], header["config"]]:
            raise InputError(
                f"{what} was traced on another model than the one given; load {header['model']!r} "
                f"(weights {header['fingerprint']}, config {header['config']})"
            )

    def _get(self, name: str, what: str, option: str) -> Tensor:
        if name not in self.tensors:
            raise InputError(f"this trace does not hold {what}; capture again with {option}")
        return self.tensors[name]


class Captured:
    """What `capture` yields; filled when its context ends."""

    def __init__(self) -> None:
        self.traces: list[Trace] = []

    @property
    def trace(self) -> Trace:
        """The only trace."""
        if len(self.traces) != 1:
            why = "read it after the with block, in which the model must run" if not self.traces else "use .traces"
            raise InputError(f"there are {len(self.traces)} traces, not one; {why}")
        return self.traces[0]


@contextmanager
def capture(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    hidden: Collection[int] = (),
    qk: Collection[int] | Literal["all"] | None = None,
    head_outputs: Collection[int] = (),
    reducers: Sequence[Reducer] = (),
    neurons: Collection[int] | Literal["all"] = (),
) -> Iterator[Captured]:
    """Record the tokens fed to `model`, in one forward or in cached steps (`model.generate`, without beams).

    The model's outputs do not change. Left padding is stripped; a batch gives one trace per row. Taking tokens
    back out of the cache takes them out of the trace; a forward that starts over starts the trace over. Pass
    `logits_to_keep=1` to a plain forward so that the model makes no (time, vocab) logits either.

    Args:
        hidden: hidden states to keep: 0 the embeddings, i the output of the i-th block, negative from the end.
        qk: layers whose queries and keys to keep, or "all".
        head_outputs: token positions whose head outputs to keep, in every layer.
        reducers: summaries of all attention rows, computed on the way.
        neurons: layers whose MLP activations to keep, or "all".

    Raises:
        InputError: unknown layer, a model whose attention or logits cannot be followed, or a cache that holds
            other tokens than those that were fed.
    """
    depth = len(decoder_layers(model))
    states = {_state(layer, depth) for layer in hidden}
    layers = set(range(depth)) if qk == "all" else set(qk or ())
    if not layers <= set(range(depth)):
        raise InputError(f"qk={sorted(layers)} is not allowed; this model has layers 0 to {depth - 1}")
    captured, recorder = Captured(), Recorder(model, layers, sorted(set(head_outputs)), reducers)
    with hold(model), ExitStack() as stack:
        stack.enter_context(on_feed(model, recorder.begin))
        caught = stack.enter_context(capture_residual(model, {i - 1 for i in states if i > 0}))
        recorder.columns.update({f"resid.{i + 1}": parts for i, parts in caught.items()})
        edits = {decoder_layers(model)[0]: recorder.keep("resid.0")} if 0 in states else {}
        for layer in range(depth if head_outputs else 0):
            edits[head_mixer(model, layer)[0]] = recorder.keep_heads(layer)
        for layer in range(depth) if neurons == "all" else sorted(set(neurons)):
            edits[down_projection(model, layer)] = recorder.keep(f"mlp.{layer}")
        stack.enter_context(edit_inputs(model, edits))
        if layers or reducers:
            stack.enter_context(observe(model, recorder.attention))
        stack.enter_context(hooked(decoder_body(model), recorder.final))
        stack.enter_context(hooked(model, recorder.check_logits, with_kwargs=True))
        yield captured
    captured.traces = [Trace(tensors, header, model) for tensors, header in recorder.sequences(tokenizer)]


def _check(tensors: dict[str, Tensor], header: TraceHeader) -> None:
    """Refuse tensors that do not belong together or to their header.

    Raises:
        ValueError: the first such tensor.
    """
    check_tensors(tensors, {"ids": (None,), "final": (None, None)})
    total = len(tensors["ids"])
    check_tensors(tensors, dict.fromkeys(("position_ids", "logprob", "entropy", "lse"), (total,)))
    inner = {"final": (total, None), "offsets": (total, 2), "positions": (None,)}
    places = tensors.get("positions", torch.zeros(0))
    for name in tensors:
        kind, _, layer = name.partition(".")
        shape = {"resid": (total, None), "mlp": (total, None), "heads": (len(places), None, None)}.get(kind)
        if kind in ("q", "k"):
            shape = (total, None, None)
            check_tensors(tensors, {f"{'k' if kind == 'q' else 'q'}.{layer}": shape})
            if layer not in header.attention:
                raise ValueError(f"the header says nothing of the attention of layer {layer}")
        inner |= {name: shape} if shape else {}
    check_tensors(tensors, {name: shape for name, shape in inner.items() if name in tensors})
    reduced = {name for name in tensors if name.startswith("reduced.")}
    whole = {"ids", "position_ids", "offsets", "positions"}
    check_floats(tensors, tensors.keys() - reduced - whole, nan=True)
    for name in tensors.keys() & whole:
        check_range(name, tensors[name], 2**31)
    if "offsets" in tensors:
        check_range("offsets", tensors["offsets"], len(header.text) + 1)
    elif header.text:
        raise ValueError("the tensor 'offsets' is missing")
    for role, spans in header.spans:
        if any(not start <= stop <= total for start, stop in spans):
            raise ValueError(f"a span of {role!r} is not within the {total} tokens")


def _index(rows: Rows, total: int) -> Tensor:
    everything = torch.arange(total)
    return everything if rows is None else everything[rows if isinstance(rows, slice) else torch.as_tensor(rows)]


def _state(layer: int, depth: int) -> int:
    """The number of a hidden state, counted from the end if negative."""
    if not -depth - 1 <= layer <= depth:
        raise InputError(f"hidden state {layer} does not exist; this model has 0 (embeddings) to {depth}")
    return layer % (depth + 1)
