"""A codebook of bipolar hypervectors and the encoder that maps a model's state to one (arXiv 2509.25045): what the
hyperdimensional probe learns and reads with."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.artifact import Artifact, Folder, Header, MadeFor
from ..core.errors import InputError
from ..core.tensors import check_tensors, with_weights
from ..models.anatomy import fingerprint

__all__ = ["Codebook", "HyperProbe", "Pair", "Tie"]

Tie = Literal["negative", "random", "zero"]
Pair = tuple[str, str]
MSE = 0.1  # weight of the squared error beside the cross-entropy


class CodebookHeader(Header):
    """What a saved codebook says of itself."""

    concepts: list[str] = Field(min_length=1)
    seed: int = Field(ge=0, lt=2**63)
    tie: Tie


class Codebook(Artifact):
    """A random vector of +1 and -1 for every concept, int8 (concepts, dim); it belongs to no model.

    Args:
        concepts: names; lower-cased and sorted.
        tie: what the sign of 0 is in a bundle of an even number of vectors. "negative" is the authors', and makes the
            missing word of two pairs appear although nothing was read of it; use "random" for claims.

    Raises:
        InputError: no concepts, empty or equal ones, another dim, seed or tie.
    """

    kind = "codebook"
    layout = Folder("codebook.safetensors", "codebook.json")
    fields = CodebookHeader
    remedy = "give a folder written by Codebook.save"
    made_for: ClassVar[dict[str, Any]] = {}

    def __init__(self, concepts: Sequence[str], dim: int = 4096, seed: int = 101, tie: Tie = "negative") -> None:
        if isinstance(concepts, str):
            raise InputError("concepts is one text; give a list of names")
        if not isinstance(dim, int) or not 256 <= dim <= 16384:
            raise InputError(f"dim={dim!r} is not allowed; give a whole number in [256, 16384]")
        names = sorted(concept.strip().lower() for concept in concepts)
        twice = sorted({a for a, b in pairwise(names) if a == b})
        if twice:
            raise InputError(f"concepts are equal after lower-casing: {', '.join(twice[:5])}; give each one once")
        draw = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 2, (len(names), dim), generator=draw, dtype=torch.int8) * 2 - 1
        self._set(names, codes, seed, tie)

    def _set(self, names: list[str], codes: Tensor, seed: int, tie: Tie) -> None:
        if not names or not all(names):
            raise InputError("a codebook has at least one concept and no empty one; give names")
        if tie not in ("negative", "random", "zero"):
            raise InputError(f"tie={tie!r} is not allowed; give negative, random or zero")
        self.concepts, self.codes, self.seed, self.tie = tuple(names), codes, seed, tie
        self.rows = {name: row for row, name in enumerate(names)}
        self.ties = torch.Generator().manual_seed(seed + 1)

    @property
    def dim(self) -> int:
        return self.codes.shape[1]

    def __len__(self) -> int:
        return len(self.concepts)

    def __contains__(self, concept: str) -> bool:
        return concept.strip().lower() in self.rows

    def __getitem__(self, concepts: str | Sequence[str]) -> Tensor:
        """The code (dim,) of a concept, or those (n, dim) of several.

        Raises:
            InputError: concepts that it does not have; all are named.
        """
        names = [concepts] if isinstance(concepts, str) else list(concepts)
        missing = [name for name in names if name not in self]
        if missing:
            raise InputError(
                f"the codebook has no concept {', '.join(map(repr, missing))}; give some of its {len(self)}"
            )
        found = self.codes[[self.rows[name.strip().lower()] for name in names]]
        return found[0] if isinstance(concepts, str) else found

    def bind(self, *vectors: Tensor) -> Tensor:
        """The elementwise product (..., dim); bound once more, a vector is taken out again."""
        product = torch.ones(self.dim, dtype=torch.int8)
        for vector in vectors:
            product = product * self._checked(vector)
        return product

    def bundle(self, *vectors: Tensor) -> Tensor:
        """The sign of the elementwise sum (..., dim), int8; ties as `tie` says."""
        if not vectors:
            raise InputError("there is nothing to bundle; give at least one vector")
        total = torch.stack([self._checked(vector).int() for vector in vectors]).sum(0)
        signs = total.sign().to(torch.int8)
        if self.tie == "zero":
            return signs
        coins = torch.full_like(signs, -1)
        if self.tie == "random":
            coins = torch.randint(0, 2, signs.shape, generator=self.ties, dtype=torch.int8) * 2 - 1
        return torch.where(signs == 0, coins, signs)

    def encode_pairs(self, pairs: Sequence[Pair], words: Sequence[str] = ()) -> Tensor:
        """The code (dim,) of a text: its bound pairs and loose words, bundled."""
        words = [words] if isinstance(words, str) else words
        bound = [self.bind(self[a], self[b]) for a, b in pairs]
        return self.bundle(*bound, *(self[word] for word in words))

    def similarities(self, vectors: Tensor) -> Tensor:
        """Cosines (..., concepts) with every code; float32."""
        if vectors.shape[-1] != self.dim:
            raise InputError(f"a vector has {vectors.shape[-1]} entries, the codebook {self.dim}; use one of its own")
        return F.normalize(vectors.float(), dim=-1) @ (self.codes.float() / self.dim**0.5).T

    def cleanup(self, vector: Tensor, k: int = 1) -> list[tuple[str, float]]:
        """The k nearest concepts of a vector (dim,) with their cosines, best first."""
        if not 1 <= k <= len(self):
            raise InputError(f"k={k} is not allowed; give a whole number in [1, {len(self)}]")
        best = self.similarities(vector).topk(k)
        return [(self.concepts[i], value) for value, i in zip(best.values.tolist(), best.indices.tolist())]

    def _checked(self, vector: Tensor) -> Tensor:
        allowed = vector.abs() <= 1 if self.tie == "zero" else vector.abs() == 1
        if vector.shape[-1] != self.dim or not bool((allowed & (vector == vector.round())).all()):
            raise InputError(
                f"a vector of shape {tuple(vector.shape)} is no code of this codebook; give {self.dim} entries of "
                "+1 or -1"
            )
        return vector.to(torch.int8)

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"codes": self.codes}, {"concepts": list(self.concepts), "seed": self.seed, "tie": self.tie}

    @classmethod
    def restored(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Codebook:
        names = header["concepts"]
        check_tensors(tensors, {"codes": (len(names), None)})
        codes = tensors["codes"]
        if codes.dtype != torch.int8 or not bool((codes.abs() == 1).all()):
            raise ValueError("the codes are not all +1 or -1")
        if names != sorted({name.strip().lower() for name in names}):
            raise ValueError("the concepts are not sorted, lower-case and different")
        book = cls.__new__(cls)
        book._set(names, codes, header["seed"], header["tie"])
        return book


class ProbeHeader(CodebookHeader):
    """What a saved probe says of itself."""

    d_model: int = Field(ge=1, lt=2**24)
    blocks: int = Field(ge=0, le=16)
    n_clusters: int = Field(ge=0, lt=2**16)
    normalize: bool
    held_out_cosine: float = Field(allow_inf_nan=True)  # nan where nothing was held out
    made_for: MadeFor


class Residual(nn.Module):
    """h + dropout(gelu(W h + b))."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(width, width), nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.dropout(F.gelu(self.linear(h)))


class HyperProbe(Artifact, nn.Module):
    """An encoder from standardized states (batch, d_model) to logits (batch, dim), read against a codebook.

    Args:
        blocks: square layers with a residual around each, after the first layer; the last one is linear.
        n_clusters, normalize: how its states were compressed, see `tokenry.read.compress_states`.

    `held_out_cosine` is that of the examples `fit` kept back.
    """

    kind = "probe"
    layout = Folder("hyperprobe.safetensors", "hyperprobe.json")
    fields = ProbeHeader
    remedy = "give a folder written by HyperProbe.save"
    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        codebook: Codebook,
        d_model: int,
        blocks: int = 3,
        dropout: float = 0.5,
        n_clusters: int = 5,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if d_model < 1 or not 0 <= blocks <= 16 or not 0 <= dropout < 1:
            raise InputError(
                f"d_model={d_model}, blocks={blocks}, dropout={dropout} is not allowed; give a width >= 1, 0 to "
                "16 blocks and a dropout in [0, 1)"
            )
        self.codebook, self.d_model, self.blocks = codebook, d_model, blocks
        self.n_clusters, self.normalize = n_clusters, normalize
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("deviation", torch.ones(d_model))
        width = codebook.dim
        middle = [Residual(width, dropout) for _ in range(blocks - 1)]
        first = nn.Linear(d_model, width)
        ends = [nn.GELU(), nn.Dropout(dropout), *middle, nn.Linear(width, width)] if blocks else []
        self.layers = nn.Sequential(first, *ends)
        self.held_out_cosine = float("nan")
        self.made_for: dict[str, Any] | None = None

    def forward(self, states: Tensor) -> Tensor:
        """Logits (batch, dim) of states (batch, d_model)."""
        if states.shape[-1] != self.d_model:
            raise InputError(f"the probe reads states of width {self.d_model}, not {states.shape[-1]}; use its model's")
        if not bool(states.isfinite().all()):
            raise InputError("a state is not finite; give states without nan and inf")
        return self.layers((states.to(self.mean.device, torch.float32) - self.mean) / self.deviation)

    @torch.no_grad()
    def vectors(self, states: Tensor) -> Tensor:
        """Hypervectors (batch, dim) of states, int8: the signs of the logits."""
        return torch.where(self.eval()(states) > 0, 1, -1).to(torch.int8).cpu()

    def read(self, state: Tensor, given: Sequence[str] = (), top_k: int = 5) -> list[tuple[str, float]]:
        """The concepts nearest to what is left of a state (d_model,) when the known ones are unbound."""
        given = [given] if isinstance(given, str) else given
        vector = self.vectors(state[None])[0]
        return self.codebook.cleanup(self.codebook.bind(vector, *(self.codebook[c] for c in given)), top_k)

    def fit(
        self,
        states: Tensor,
        targets: Tensor,
        *,
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-4,
        epochs: int = 100,
        batch_size: int = 32,
        held_out: float = 0.1,
        seed: int = 101,
    ) -> HyperProbe:
        """Train on states (n, d_model) and codes (n, dim): cross-entropy of each sign plus 0.1 squared error, AdamW,
        the epoch with the best cosine on the examples held out.

        Raises:
            InputError: states that are not finite, codes that are not bipolar, fewer than two examples.
        """
        states = states.detach().cpu().float()
        if states.dim() != 2 or len(states) != len(targets) or len(states) < 2 or not bool(states.isfinite().all()):
            raise InputError(
                f"states {tuple(states.shape)} for {len(targets)} codes are not allowed; give a finite state for each, "
                "two at least"
            )
        codes = self.codebook._checked(targets)
        draw = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(states), generator=draw)
        kept, used = order[: int(held_out * len(order))], order[int(held_out * len(order)) :]
        self._restart(states[used], seed)
        optimizer = torch.optim.AdamW(self.parameters(), lr=learning_rate, weight_decay=weight_decay)
        best, weights = -2.0, self.state_dict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for _ in range(epochs):
                self.train()
                for batch in used[torch.randperm(len(used), generator=draw)].split(batch_size):
                    optimizer.zero_grad()
                    self.loss(states[batch], codes[batch].float()).backward()
                    optimizer.step()
                found = self.cosine(states[kept], codes[kept]) if len(kept) else 2.0
                if found > best or not len(kept):
                    best, weights = found, {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.load_state_dict(weights)
        self.held_out_cosine = best if len(kept) else float("nan")
        return self.eval()

    def loss(self, states: Tensor, codes: Tensor) -> Tensor:
        """Mean over signs of BCE(logits, (code + 1) / 2) + 0.1 (logits - code)^2."""
        logits = self(states)
        return F.binary_cross_entropy_with_logits(logits, (codes + 1) / 2) + MSE * F.mse_loss(logits, codes)

    def cosine(self, states: Tensor, codes: Tensor) -> float:
        """Mean cosine of the read vectors with codes."""
        return float(F.cosine_similarity(self.vectors(states).float(), codes.float(), dim=-1).mean())

    def _restart(self, states: Tensor, seed: int) -> None:
        self.forward(states[:1])  # refuses another width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()
        self.mean.copy_(states.mean(0))
        self.deviation.copy_(states.std(0, correction=0).clamp(min=1e-6))

    # --- whom it belongs to ------------------------------------------------------------------------------------------

    def bind(self, model: PreTrainedModel) -> HyperProbe:
        """Say that it was trained on states of `model`."""
        self.made_for = {"model": model.config._name_or_path, "fingerprint": fingerprint(model)}
        return self

    def stored(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        codes, book = self.codebook.stored()
        sizes = {"d_model": self.d_model, "blocks": self.blocks, "n_clusters": self.n_clusters}
        about = {"normalize": self.normalize, "held_out_cosine": self.held_out_cosine, "made_for": self.made_for}
        return {**codes, **self.state_dict()}, {**book, **sizes, **about}

    @classmethod
    def restored(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> HyperProbe:
        book = Codebook.restored(header, tensors)
        weights = {name: tensor for name, tensor in tensors.items() if name != "codes"}
        sizes = {name: header[name] for name in ("d_model", "blocks", "n_clusters", "normalize")}
        probe = with_weights(lambda: cls(book, **sizes), weights)
        probe.held_out_cosine, probe.made_for = float(header["held_out_cosine"]), header["made_for"]
        return probe.eval()
