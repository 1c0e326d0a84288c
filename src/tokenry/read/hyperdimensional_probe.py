"""Hyperdimensional probe: which concepts of a list of one's own a state holds, and which belongs to which.

Paper: Hyperdimensional Probe: Decoding LLM Representations via Vector Symbolic Architectures, arXiv 2509.25045.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from itertools import combinations
from typing import Annotated, ClassVar, cast

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from ..core.errors import InputError
from ..core.fields import Count, Probability, Rate, Share, Weight
from ..core.method import read_words
from ..core.progress import Progress
from ..data.analogies import draw_analogies
from ..learned.hyper_probe import Codebook, HyperProbe, Tie
from ..models.anatomy import fingerprint
from ..models.load import Loaded
from ..trace.trace import Trace, capture
from .contract import Fitted, Reading, ReadMethod
from .hyper.documents import Document, documents_in
from .hyper.states import compress_states, read_states, trace_states

__all__ = ["ConceptReading", "HyperdimensionalProbe"]


class HyperdimensionalProbe(ReadMethod):
    """Train an encoder from a state to a hypervector, and read the concepts out of it.

    learned = HyperdimensionalProbe(tie="random").fit(loaded, documents).artifact
    HyperdimensionalProbe(given=("rome",)).read("paris : france = rome :", learned, loaded).to_frame()
    """

    slug: ClassVar[str] = "hyperdimensional-probe"
    title: ClassVar[str] = "Hyperdimensional probe"
    paper: ClassVar[str] = (
        "Hyperdimensional Probe: Decoding LLM Representations via Vector Symbolic Architectures, arXiv 2509.25045"
    )
    claim: ClassVar[str] = "A state, mapped to a hypervector, tells which concepts of a list the model holds."
    caution: ClassVar[str] = (
        "With tie=negative the missing word of two pairs appears at a cosine near 0.5 when the other three are "
        "unbound, although nothing was read of it; use tie=random for anything you want to believe."
    )

    takes: ClassVar = ("text", "trace")
    artifact: ClassVar[type] = HyperProbe
    learns_from: ClassVar[str] = (
        "a file with a line such as 'paris : france = rome : italy' for each text, or analogies:N for N of countries"
    )
    fit_options: ClassVar[tuple[str, ...]] = (
        *("dim", "n_clusters", "normalize", "tie", "blocks", "dropout", "weight_decay", "learning_rate", "epochs"),
        "seed",
    )
    input_options: ClassVar[tuple[str, ...]] = ("given", "subsets", "position", "top_k", "threshold")

    dim: int = Field(default=4096, ge=256, le=16384, description="entries of a hypervector")
    n_clusters: int = Field(
        default=5, ge=0, le=1024, description="clusters of the layers' states; 0 for their mean instead"
    )
    normalize: bool = Field(default=False, description="give the states of all layers one scale before clustering")
    tie: Tie = Field(default="negative", description="sign of 0 where an even number of vectors is bundled")
    blocks: int = Field(default=3, ge=0, le=16, description="square layers of the encoder after its first one")
    dropout: Share = Field(default=0.5, description="in the encoder")
    weight_decay: Weight = Field(default=1e-4, description="of AdamW")
    learning_rate: Rate = Field(default=1e-4, description="of AdamW")
    epochs: Count = Field(default=100, description="passes over the texts")
    seed: int = Field(default=101, ge=0, le=2**32 - 1, description="of the codebook and the training")
    given: Annotated[tuple[str, ...], BeforeValidator(read_words)] = Field(
        default=(), max_length=8, description="known concepts that are unbound, with commas between or a JSON list"
    )
    subsets: bool = Field(
        default=False, description="try all subsets of the given concepts, and take the one with the highest cosine"
    )
    position: int = Field(default=-1, ge=-(2**20), le=2**20, description="token that is read; -1 for the last one")
    top_k: Count = Field(default=5, description="concepts listed, at most")
    threshold: Probability = Field(default=0.1, description="cosine below which nothing is found")

    def examples(self, source: str, text: str | None) -> list[Document]:
        """The documents of a file, or analogies of countries, capitals and currencies for analogies:N."""
        if text is not None:
            return documents_in(text, source)
        task, _, count = source.partition(":")
        if task != "analogies" or not count.isdecimal():
            raise InputError(f"{source!r} is no file and no known task; give {self.learns_from}")
        lines = ["{} : {} = {} : {}".format(*words) for words in draw_analogies(int(count))]
        return documents_in("\n".join(lines), source)

    def fit(self, loaded: Loaded, data: list[Document] | None = None, progress: Progress | None = None) -> Fitted:
        """Read every text without its last word, and train the encoder on the codes of the whole ones."""
        if not data:
            raise InputError(f"{self.slug} has nothing to learn from; give documents, see `examples`")
        names = sorted({concept for document in data for concept in document.concepts})
        book = Codebook(names, self.dim, self.seed, self.tie)
        codes = torch.stack([book.encode_pairs(document.pairs, document.words) for document in data])
        hidden = read_states(*loaded, [document.prompt for document in data], progress=progress)
        probe = self.train(compress_states(hidden, self.n_clusters, self.normalize), codes, book).bind(loaded.model)
        quality = f"{len(book)} concepts, cosine {probe.held_out_cosine:.2f} on the texts held out"
        return Fitted(probe, [], quality)

    def train(self, states: Tensor, codes: Tensor, book: Codebook) -> HyperProbe:
        """An encoder of compressed states (n, width) with these settings, bound to no model yet."""
        probe = HyperProbe(book, states.shape[1], self.blocks, self.dropout, self.n_clusters, self.normalize)
        options = {name: getattr(self, name) for name in ("learning_rate", "weight_decay", "epochs", "seed")}
        return probe.fit(states, codes, **options)

    def load(self, path: str, loaded: Loaded) -> HyperProbe:
        """See `HyperProbe.load`; one of another model is refused."""
        probe = HyperProbe.load(path)
        probe.check_made_for(fingerprint(loaded.model))
        return probe

    def read(
        self, given: str | Trace, artifact: HyperProbe | None = None, loaded: Loaded | None = None
    ) -> ConceptReading:
        """The concepts at a token, with the cosine of what is left when `given` is unbound; none below `threshold`.

        Raises:
            InputError: no probe, a text without the model, a trace of another model or without the states, unknown
                concepts.
        """
        if artifact is None or (loaded is None and isinstance(given, str)):
            raise InputError("concepts need a probe, and a text its model; give artifact= and loaded=")
        trace = _traced(given, cast(Loaded, loaded)) if isinstance(given, str) else given
        artifact.check_made_for(trace.header["fingerprint"])
        state = compress_states(trace_states(trace, self.position), artifact.n_clusters, artifact.normalize)
        known, found = self._best(artifact, state)
        place = self.position % len(trace)
        rows = [
            {"position": place, "concept": concept, "cosine": cosine, "given": list(known)}
            for concept, cosine in found
            if cosine >= self.threshold
        ]
        return ConceptReading(f"concepts at token {place} with a cosine of at least {self.threshold:g}", rows)

    def _best(self, probe: HyperProbe, state: Tensor) -> tuple[tuple[str, ...], list[tuple[str, float]]]:
        """The query and what it finds; a query that finds its own words is an artifact, and chosen last."""
        sizes = range(len(self.given), -1, -1) if self.subsets else [len(self.given)]
        queries = [query for size in sizes for query in combinations(self.given, size)]
        found = {query: probe.read(state, query, min(self.top_k, len(probe.codebook))) for query in queries}

        def rank(query: tuple[str, ...]) -> tuple[bool, float]:
            own = {word.strip().lower() for word in query}
            return not any(concept in own and cosine > self.threshold for concept, cosine in found[query]), found[
                query
            ][0][1]

        best = max(queries, key=rank)
        return best, found[best]


@dataclass(frozen=True)
class ConceptReading(Reading):
    """Concepts and their cosines."""

    def picture(self) -> str:
        """A bar for each concept."""
        bars = []
        for i, row in enumerate(self.rows):
            y, width = 22 * i, max(0.0, row["cosine"]) * 300
            bars.append(
                f'<text x="150" y="{y + 15}" text-anchor="end">{escape(row["concept"][:24])}</text>'
                f'<rect x="160" y="{y + 3}" width="{width:.1f}" height="16" fill="#4878a8"/>'
                f'<text x="{width + 166:.1f}" y="{y + 15}">{row["cosine"]:.2f}</text>'
            )
        if not bars:
            return "<p>nothing was found</p>"
        box = f'viewBox="0 0 520 {22 * len(bars)}" width="520" font-size="13" fill="currentColor"'
        return f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {box}>{"".join(bars)}</svg>'


def _traced(text: str, loaded: Loaded) -> Trace:
    """The text with the states that the probe reads."""
    depth = loaded.model.config.get_text_config().num_hidden_layers
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids.to(loaded.model.device)
    if not ids.numel():
        raise InputError("the text is empty; give some text to read")
    with capture(*loaded, hidden=list(range(max(1, depth // 2), depth))) as caught, torch.no_grad():
        loaded.model(ids, use_cache=False, logits_to_keep=1)
    return caught.trace
