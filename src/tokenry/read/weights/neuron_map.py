"""NeuronMap: every MLP neuron of a model with the tokens that its weights point at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.artifact import Artifact, Header, TensorFile
from ...core.errors import InputError
from ...core.progress import Progress
from ...core.tensors import check_floats, check_range, check_tensors
from ...models.anatomy import decoder_layers, fingerprint, unembedding
from ..contract import Reading
from .directions import TILE, Side, Spread, neuron_rows, top_tokens

__all__ = ["NeuronMap", "Overlap"]


@dataclass(frozen=True)
class Overlap:
    """How many neurons have the same top token in two models, and how many would by chance."""

    share: float
    chance: float
    by_layer: list[tuple[float, float]]  # (share, chance) of each layer


class MapHeader(Header):
    """What a saved map says of itself."""

    model: str
    fingerprint: str
    side: Side
    fold_norm: bool
    top_k: int = Field(ge=1, lt=2**31)
    vocabulary: int = Field(ge=1, lt=2**31)
    texts: dict[str, str]


class NeuronMap(Artifact):
    """Every MLP neuron of a model with its top tokens.

    Attributes:
        tensors: "ids" int32 and "logits" (layers, neurons, k), "lse", "deviation" (layers, neurons), and with bottom
            tokens "bottom_ids", "bottom_logits".
        header: format, model, fingerprint, side, fold_norm, vocabulary, and `texts`: {token id: text} of stored ids.
        model, tokenizer: for exact answers about any token; None if loaded without them.
    """

    kind = "map"
    layout = TensorFile("tokenry_neurons")
    fields = MapHeader
    remedy = "give a file written by NeuronMap.save"
    unread = "{path!r} cannot be read as a {kind}"
    foreign = "{path!r} has no header of a neuron map"
    named = "the {kind} {path!r}"
    stranger = (
        "this map was made for {model!r} (weights {fingerprint}), not for the weights {found}; map that model with "
        "LMHeadNeurons().map(model, tokenizer)"
    )

    def __init__(
        self,
        tensors: dict[str, Tensor],
        header: dict[str, Any],
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.tensors, self.header, self.model, self.tokenizer = tensors, header, model, tokenizer

    @classmethod
    def from_model(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        side: Side = "up",
        fold_norm: bool = False,
        top_k: int = 10,
        chunk: int = 512,
        bottom: bool = False,
        progress: Progress | None = None,
    ) -> NeuronMap:
        """Decode every neuron of every layer. Arguments as for `LMHeadNeurons`.

        Args:
            progress: called with (layers done, layers, what is done).

        Raises:
            InputError: see `neuron_rows`; a top_k above the vocabulary.
        """
        head = unembedding(model)
        if not 1 <= top_k <= len(head):
            raise InputError(f"top_k={top_k} is not allowed; this vocabulary has 1 to {len(head)} tokens")
        depth, spread = len(decoder_layers(model)), Spread.of(head)
        stored = min(max(top_k, 2), len(head))  # the gap needs two
        layers = []
        for layer in range(depth):
            parts = []
            for part in neuron_rows(model, layer, side, fold_norm).split(chunk):
                parts.append({**top_tokens(part, head, stored, bottom)._asdict(), "deviation": spread.deviation(part)})
            layers.append({n: torch.cat([p[n] for p in parts]).cpu() for n, t in parts[0].items() if t is not None})
            if progress:
                progress(layer + 1, depth, f"layer {layer}")
        header = {
            "format": cls.version,
            "model": model.config._name_or_path or type(model).__name__,
            "fingerprint": fingerprint(model),
            "side": side,
            "fold_norm": fold_norm,
            "top_k": top_k,
            "vocabulary": len(head),
        }
        tensors = {name: torch.stack([found[name] for found in layers]) for name in layers[0]}
        ids = torch.cat([tensors[n].flatten() for n in ("ids", "bottom_ids") if n in tensors]).unique().tolist()
        texts = {str(i): tokenizer.decode([i], clean_up_tokenization_spaces=False) or f"<{i}>" for i in ids}
        return cls(tensors, {**header, "texts": texts}, model, tokenizer)

    # --- looking up ----------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, neurons of a layer)."""
        layers, width = self.tensors["lse"].shape
        return layers, width

    @property
    def top(self) -> Tensor:
        """(layers, neurons): each neuron's top token."""
        return self.tensors["ids"][..., 0]

    @property
    def probability(self) -> Tensor:
        """(layers, neurons): the probability of each neuron's top token."""
        return (self.tensors["logits"][..., 0] - self.tensors["lse"]).exp()

    @property
    def gap(self) -> Tensor:
        """(layers, neurons): first minus second logit, in standard deviations of the neuron's logits (scale-free)."""
        first, second = self.tensors["logits"][..., :2].unbind(-1)
        return (first - second) / self.tensors["deviation"]

    def named_layers(self, min_prob: float) -> list[int]:
        """Layers with a neuron whose top token has at least this probability."""
        return (self.probability >= min_prob).any(1).nonzero().flatten().tolist()

    def text(self, token: int | Tensor) -> str:
        """What a stored token decodes to."""
        return self.header["texts"][str(int(token))]

    def neurons(self, places: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
        """(layer, neuron) pairs as rows: best tokens, both specialization scores, cosine rank of the top token."""
        for layer, neuron in places:
            self._check(layer, neuron)
        ranks = self.cosine_ranks([(i, j, int(self.top[i, j])) for i, j in places])
        rows = []
        for (i, j), rank in zip(places, ranks):
            row = {
                "layer": i,
                "neuron": j,
                "token": self.text(self.top[i, j]),
                "probability": float(self.probability[i, j]),
                "gap": float(self.gap[i, j]),
                "cosine_rank": rank,
                "tokens": self._texts("ids", i, j),
            }
            rows.append({**row, "bottom": self._texts("bottom_ids", i, j)} if "bottom_ids" in self.tensors else row)
        return rows

    def _check(self, layer: int, neuron: int = 0) -> None:
        layers, width = self.shape
        if not 0 <= layer < layers:
            raise InputError(f"layer {layer} does not exist; this map has layers 0 to {layers - 1}")
        if not 0 <= neuron < width:
            raise InputError(f"neuron {neuron} does not exist; each layer has neurons 0 to {width - 1}")

    def _texts(self, name: str, layer: int, neuron: int) -> list[str]:
        return [self.text(i) for i in self.tensors[name][layer, neuron, : self.header["top_k"]]]

    def table(self, layer: int, limit: int = 20) -> Reading:
        """The most specialized neurons of a layer, by the gap between first and second logit."""
        self._check(layer)
        order = self.gap[layer].topk(min(limit, self.shape[1])).indices.tolist()
        return Reading(f"most specialized neurons of layer {layer}", self.neurons([(layer, j) for j in order]))

    @torch.no_grad()
    def cosine_ranks(self, triples: Sequence[tuple[int, int, int]]) -> list[int | None]:
        """Rank of each (layer, neuron, token) by cosine (1 is first), where tokens with long rows have no advantage.

        None without the model.
        """
        if self.model is None or not triples:
            return [None] * len(triples)
        head = unembedding(self.model)
        layers = {i: self._rows(i) for i in {i for i, _, _ in triples}}
        rows = torch.stack([layers[i][j] for i, j, _ in triples])
        tokens = torch.tensor([t for _, _, t in triples], device=head.device)
        own = (nn.functional.normalize(head[tokens].float(), dim=1) * rows).sum(1)
        larger = torch.zeros(len(rows), dtype=torch.long, device=head.device)
        for start, part in zip(range(0, len(head), TILE), head.split(TILE)):
            cosines = nn.functional.normalize(part.float(), dim=1) @ rows.T
            mine = torch.arange(start, start + len(part), device=head.device)[:, None] == tokens
            larger += ((cosines > own) & ~mine).sum(0)  # its own product may differ by a rounding
        return (larger + 1).tolist()

    def _rows(self, layer: int) -> Tensor:
        return neuron_rows(cast(PreTrainedModel, self.model), layer, self.header["side"], self.header["fold_norm"])

    def find(self, word: str, limit: int = 20) -> Reading:
        """The neurons that give the highest probability to a word, over all layers.

        The word counts with and without a space before it, capitalized or not, and in the plural, whatever of it is
        one token; a neuron has the probability of its best form. With the model at hand the answer is exact for every
        token; a map loaded alone knows only the neurons that have the token among their stored ones.

        Raises:
            InputError: the word is empty, or no form of it is one token (its pieces are listed).
        """
        tokens = self._forms(word)
        found = [(self._log_probability(token), token) for token in tokens]
        scores = torch.stack([score for score, _ in found])  # (forms, layers, neurons)
        best, form = scores.max(0)
        order = best.flatten().topk(min(limit, best.numel()))
        places = [divmod(p, self.shape[1]) for p, s in zip(order.indices.tolist(), order.values) if s > -math.inf]
        asked = [found[form[i, j]][1] for i, j in places]
        ranks = self.cosine_ranks([(i, j, t) for (i, j), t in zip(places, asked)])
        rows = [
            {
                "layer": i,
                "neuron": j,
                "form": tokens[token],
                "probability": float(best[i, j].exp()),
                "cosine_rank": rank,
                "tokens": self._texts("ids", i, j),
            }
            for (i, j), token, rank in zip(places, asked, ranks)
        ]
        known = "" if self.model else f" (without the model: only among the top {self.header['top_k']} of each neuron)"
        return Reading(f"neurons for {word.strip()!r}{known}", rows)

    def _forms(self, word: str) -> dict[int, str]:
        """{token id: text} of the forms of a word that are one token."""
        base = word.strip()
        if not base:
            raise InputError("the word to find is empty; give for example 'dog'")
        if self.tokenizer is None:
            ids = {text: int(token) for token, text in self.header["texts"].items()}
            forms = {ids[form]: form for form in _variants(base) if form in ids}
            if not forms:
                raise InputError(f"no neuron of this map has {base!r} among its stored tokens; load it with the model")
            return forms
        forms = {}
        for form in _variants(base):
            pieces = self.tokenizer.encode(form, add_special_tokens=False)
            if len(pieces) == 1 and self.tokenizer.decode(pieces, clean_up_tokenization_spaces=False) == form:
                forms[pieces[0]] = form
        if not forms:
            pieces = [self.tokenizer.decode([i]) for i in self.tokenizer.encode(" " + base, add_special_tokens=False)]
            shown = " + ".join(map(repr, pieces))
            raise InputError(f"{base!r} is not one token here but {shown}; search for a word that is one token")
        return forms

    @torch.no_grad()
    def _log_probability(self, token: int) -> Tensor:
        """(layers, neurons): log-probability of a token; -inf where it is not known."""
        if self.model is None:
            held = self.tensors["ids"] == token
            logits = self.tensors["logits"].masked_fill(~held, -math.inf).amax(-1)
        else:
            direction = unembedding(self.model)[token].float()
            logits = torch.stack([self._rows(layer) @ direction for layer in range(self.shape[0])]).cpu()
        return logits - self.tensors["lse"]

    # --- two models ----------------------------------------------------------------------------------------------

    def overlap(self, other: NeuronMap) -> Overlap:
        """Share of neurons with the same top token in both maps, and the share expected by chance.

        Chance is the sum over tokens of the product of their frequencies as top tokens in the two maps.

        Raises:
            InputError: maps of other shapes, vocabularies or settings.
        """
        for name, mine, theirs in (
            ("(layers, neurons)", self.shape, other.shape),
            ("tokens in the vocabulary", self.header["vocabulary"], other.header["vocabulary"]),
            ("side and fold_norm", *((m.header["side"], m.header["fold_norm"]) for m in (self, other))),
        ):
            if mine != theirs:
                raise InputError(
                    f"the maps differ in {name}, {mine} and {theirs}; compare two checkpoints of one model"
                )
        a, b = self.header["texts"], other.header["texts"]
        common = a.keys() & b.keys()
        if sum(a[i] != b[i] for i in common) > 0.01 * len(common):  # a few special tokens may have been renamed
            raise InputError("the maps have different vocabularies; compare two checkpoints with one tokenizer")
        layers = [_agreement(x, y) for x, y in zip(self.top, other.top)]
        return Overlap(*_agreement(self.top.flatten(), other.top.flatten()), layers)

    # --- files ---------------------------------------------------------------------------------------------------

    @property
    def made_for(self) -> dict[str, Any]:
        """Whose neurons these are, as the header says."""
        return {name: self.header[name] for name in ("model", "fingerprint")}

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.tensors, self.header

    @classmethod
    def restored(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> NeuronMap:
        _check(tensors, header)
        return cls(tensors, header)

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> NeuronMap:
        """Read a file written by `save`. With `model`, which must be the one that was mapped, answers are exact.

        Raises:
            InputError: not a map, a newer format, or another model.
        """
        found = super().load(path)
        found.model, found.tokenizer = model, tokenizer
        if model is not None:
            found.check_made_for(fingerprint(model))
        return found


def _check(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Refuse tensors that do not belong together or to their header.

    Raises:
        ValueError: the first such tensor.
    """
    check_tensors(tensors, {"lse": (None, None)})
    stored = min(max(header["top_k"], 2), header["vocabulary"])
    shapes = {"deviation": tuple(tensors["lse"].shape)}
    for ids, logits in (("ids", "logits"), ("bottom_ids", "bottom_logits")):
        if ids == "ids" or ids in tensors:
            shapes |= {name: (*tensors["lse"].shape, stored) for name in (ids, logits)}
    check_tensors(tensors, shapes)
    check_floats(tensors, tensors.keys() - {"ids", "bottom_ids"})
    for name in tensors.keys() & {"ids", "bottom_ids"}:
        check_range(name, tensors[name], header["vocabulary"])
        unnamed = [i for i in map(str, tensors[name].unique().tolist()) if i not in header["texts"]]
        if unnamed:
            raise ValueError(f"the header has no text of token {unnamed[0]}")
    if not all(text.isdecimal() and text.isascii() for text in header["texts"]):
        raise ValueError("the header has texts of tokens that are no numbers")


def _agreement(a: Tensor, b: Tensor) -> tuple[float, float]:
    """(share of equal entries, share expected from the frequencies alone)."""
    size = int(max(a.max(), b.max())) + 1
    first, second = (torch.bincount(x.long(), minlength=size).double() / len(x) for x in (a, b))
    return float((a == b).double().mean()), float(first @ second)


def _variants(word: str) -> Iterator[str]:
    """A word with and without a space and a capital, in the singular and the regular English plural."""
    for base in dict.fromkeys((word, word[:1].upper() + word[1:], word.lower())):
        for form in (base, _plural(base)):
            yield " " + form
            yield form


def _plural(word: str) -> str:
    if word[-1:] == "y" and word[-2:-1] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s")
