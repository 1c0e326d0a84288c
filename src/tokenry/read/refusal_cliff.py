"""Refusal cliff: how sure the model is to refuse, token by token, and the fall of it right before the answer.

Paper: Refusal Falls off a Cliff: How Safety Alignment Fails in Reasoning?, arXiv 2510.06036. The probe reads the
residual stream before the last norm, into which the heads write, so that what they add is measured where it is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Batch, Count, Rate, TorchSeed
from ..core.progress import Progress
from ..learned.linear_probe import LEAST, LinearProbe, state_number
from ..models.load import Loaded
from ..trace.trace import Trace
from .cliff.curve import LAST, Cliff, Plateau, cliff_score, place_of
from .cliff.examples import Example, balanced, end_states, examples_in, text_of, traced
from .cliff.heads import head_contributions, lowest
from .cliff.picture import curve_picture
from .contract import Fitted, Reading, ReadMethod

__all__ = ["CliffReading", "RefusalCliff"]


class RefusalCliff(ReadMethod):
    """Train a probe for refusals at the end of the thinking, follow it along a trace, and blame heads for its fall.

    method, loaded = RefusalCliff(), load("zoo/refuser")
    probe = method.fit(loaded, examples).artifact
    method.read(text, probe, loaded).plot()
    """

    slug: ClassVar[str] = "refusal-cliff"
    title: ClassVar[str] = "Refusal cliff"
    paper: ClassVar[str] = "Refusal Falls off a Cliff: How Safety Alignment Fails in Reasoning?, arXiv 2510.06036"
    claim: ClassVar[str] = (
        "A reasoning model that answers a harmful prompt meant to refuse it while it was thinking: that falls right "
        "before the answer, and silencing the few heads that push it down brings refusals back."
    )
    published: ClassVar[Claim] = Claim("< 10 %", "attack success with 3 % of the heads silenced", "R1-Distill-Llama-8B")

    takes: ClassVar = ("text", "trace")
    artifact: ClassVar[type] = LinearProbe
    learns_from: ClassVar[str] = "a file with lines of {prompt: ..., thinking: ..., response: ... or label: 0 or 1}"
    fit_options: ClassVar[tuple[str, ...]] = (
        *("layer", "learning_rate", "epochs", "batch_size", "max_per_class", "seed"),
    )
    input_options: ClassVar[tuple[str, ...]] = ("plateau", "last_k", "n_heads")

    layer: int = Field(
        default=-1, ge=-1024, le=1024, description="hidden state that is read: 0 the embeddings, -1 the last"
    )
    learning_rate: Rate = Field(default=1e-3, description="of Adam")
    epochs: Count = Field(default=5, description="passes over the examples")
    batch_size: Batch = Field(default=64, description="examples of a step")
    max_per_class: int = Field(default=200, ge=LEAST, le=10**6, description="examples drawn of each class at most")
    seed: TorchSeed = Field(default=0, description="of drawing and training")
    plateau: Plateau = Field(
        default="mean_think", description="height of the thinking: mean_think, max, or last_k for the mean of its end"
    )
    last_k: Count = Field(default=LAST, description="tokens of that end")
    n_heads: Count | None = Field(default=None, description="heads listed that push down; none: 3 % of all")

    def examples(self, source: str, text: str | None) -> list[Example]:
        """The examples of a file."""
        if text is None:
            raise InputError(f"{source!r} is no file; give {self.learns_from}")
        return examples_in(text, source)

    def fit(self, loaded: Loaded, data: Sequence[Example] | None = None, progress: Progress | None = None) -> Fitted:
        """Train the probe on as many refusals as other responses."""
        if data is None:
            raise InputError(f"{self.slug} has nothing to learn from; give examples, see `examples`")
        chosen = balanced(data, self.max_per_class, self.seed)
        texts = [text_of(loaded[1], row.prompt, row.thinking) for row in chosen]
        probe = self.probe(*loaded, texts, [row.label for row in chosen])
        return Fitted(probe, [], f"right on {probe.held_out_accuracy:.0%} of the examples held out")

    def probe(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        labels: Sequence[int],
    ) -> LinearProbe:
        """A probe of the last tokens of these texts, see `text_of`, and their labels, bound to the model."""
        layer = state_number(model, self.layer)
        return self.train(end_states(model, tokenizer, texts, layer), labels, layer).bind(model)

    def train(self, states: torch.Tensor, labels: Sequence[int], layer: int) -> LinearProbe:
        """A probe of hidden states `layer` (n, width) with these settings, bound to no model yet."""
        probe = LinearProbe(states.shape[1], layer)
        options = {name: getattr(self, name) for name in ("learning_rate", "epochs", "batch_size", "seed")}
        return probe.fit(states, labels, **options)

    def load(self, path: str, loaded: Loaded) -> LinearProbe:
        """See `LinearProbe.load` and `check`."""
        probe = LinearProbe.load(path)
        probe.check(loaded[0])
        return probe

    def read(
        self, given: str | Trace, artifact: LinearProbe | None = None, loaded: Loaded | None = None
    ) -> CliffReading:
        """The curve along the tokens, its cliff, and the heads that push it down where the model is there.

        Args:
            given: a whole text in the model's template, thinking between <think> and </think>, or a trace of one.
        """
        if artifact is None:
            raise InputError(f"{self.slug} reads with a probe; give artifact=, see `fit`")
        if isinstance(given, str):
            if loaded is None:
                raise InputError("a text needs the model that reads it; give loaded=, or a trace")
            (given,) = traced(*loaded, [given], artifact.layer)
        place, curve = place_of(given), artifact.curve(given)
        found = cliff_score(curve, *place, self.plateau, self.last_k)
        heads = [] if loaded is None else self.heads(loaded[0], given.ids[: place.end], artifact)
        roles = ["think" if place.think[0] <= t < place.think[1] else "prompt" for t in range(len(given))]
        roles[place.think[1] :] = ["mark"] * (place.end - place.think[1]) + ["answer"] * (len(given) - place.end)
        tokens = [given.text[a:b] for a, b in given.offsets.tolist()]
        rows = [
            {"token": token, "role": role, "refusal": score}
            for token, role, score in zip(tokens, roles, curve.tolist())
        ]
        return CliffReading(title_of(found, heads, tokens), rows, found, heads)

    def heads(self, model: PreTrainedModel, ids: torch.Tensor, probe: LinearProbe) -> list[tuple[int, int, float]]:
        """The heads (layer, head, contribution) that push the probe down most at the last of these tokens (time,)."""
        probe.check(model)
        found = head_contributions(model, {"input_ids": ids[None].to(model.device)}, probe.direction)
        count = max(1, round(0.03 * found.numel())) if self.n_heads is None else self.n_heads
        return lowest(found, count, probe.layer)  # blocks behind the probe's layer write nothing into its state


@dataclass(frozen=True)
class CliffReading(Reading):
    """A row per token, with `cliff` and `heads`, the (layer, head, contribution) that push down, lowest first."""

    cliff: Cliff
    heads: list[tuple[int, int, float]]

    def to_json(self) -> dict[str, Any]:
        """Title, rows, cliff and heads."""
        heads = [dict(zip(("layer", "head", "contribution"), head)) for head in self.heads]
        return {"title": self.title, "rows": self.rows, "cliff": self.cliff._asdict(), "heads": heads}

    def picture(self) -> str:
        """The curve over the tokens, as SVG."""
        return curve_picture(self.rows, self.cliff)


def title_of(found: Cliff, heads: Sequence[tuple[int, int, float]], tokens: Sequence[str]) -> str:
    """The numbers in one line."""
    where = "" if found.falls_at is None else f", falls at token {found.falls_at} {tokens[found.falls_at]!r}"
    pushed = ", ".join(f"{layer}.{head} ({value:+.2f})" for layer, head, value in heads)
    blamed = f"; heads that push down most (layer.head): {pushed}" if heads else ""
    return (
        f"refusal along the tokens: plateau {found.plateau:.2f}, final {found.final:.2f}, cliff {found.cliff:+.2f}"
        f"{where}{blamed}"
    )
