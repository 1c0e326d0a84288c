"""The decode loop that drafts: drafter -> draft tree -> one forward of the target -> verifier -> commit -> rollback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessorList

from ...core.errors import InputError
from ...core.fields import Drafts, check
from ...models.batch import left_padded
from ..api import loop
from ..generation.engine import TreeEngine
from ..generation.job import Job
from ..generation.loop import DecodeLoop
from ..generation.options import hands_on_to
from ..generation.output import UNSET, DecodeOutput
from ..generation.plugins import NO_PLUGINS, Plugins
from ..generation.sequence import SequenceState
from .drafters import CachedDrafter, Drafter, make_drafter
from .tree import ROOT, DraftTree, slots
from .verifiers import VERIFIERS, KSeqVerifier, SingleDraftVerifier, Verifier, sample_drafts

__all__ = ["Speculation", "SpeculativeLoop", "SpeculativeOutput", "SpeculativeStats", "speculative"]


class Position(NamedTuple):
    """A position that had drafts. `taken`: a drafted token came out; `explicitly`: it passed a test of the verifier."""

    depth: int
    taken: bool
    explicitly: bool


@dataclass
class SpeculativeStats:
    """What drafting has brought, over all rows. The forward of the prompt is not counted, nor the token after it.

    Attributes:
        target_calls: forwards of the target, counted for each row that took part.
        drafted: tokens drafted.
        emitted: tokens that came out.
        positions: those that had drafts, in the order in which the verifier met them.
    """

    target_calls: int = 0
    drafted: int = 0
    emitted: int = 0
    positions: list[Position] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        """Tokens that came out and had been drafted, whichever way the verifier came to them."""
        return sum(position.taken for position in self.positions)

    @property
    def accepted_explicitly(self) -> int:
        """Drafted tokens that passed a test of the verifier."""
        return sum(position.explicitly for position in self.positions)

    @property
    def block_efficiency(self) -> float:
        """Tokens per forward of the target; plain decoding has 1."""
        return self.emitted / self.target_calls if self.target_calls else float("nan")

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Share of the positions with drafts where a drafted token came out, the first position of a step first."""
        depths = range(1 + max((position.depth for position in self.positions), default=-1))
        met = [[position.taken for position in self.positions if position.depth == depth] for depth in depths]
        return [sum(taken) / len(taken) for taken in met]

    def summary(self) -> dict[str, Any]:
        """The counts, for JSON."""
        return {"drafting": {n: getattr(self, n) for n in ("target_calls", "drafted", "accepted", "emitted")}}

    def in_words(self) -> str | None:
        """What the command line says; None before the first forward."""
        return f"{self.block_efficiency:.2f} tokens per forward pass of the model" if self.target_calls else None


@dataclass
class SpeculativeOutput(DecodeOutput):
    """A `DecodeOutput` with what drafting has brought."""

    stats: SpeculativeStats = UNSET


@dataclass(frozen=True)
class Speculation:
    """A drafter, a verifier, and the size of the tree: `num_drafts` tokens at each of `draft_length` depths."""

    drafter: Drafter
    verifier: Verifier
    num_drafts: int = 8
    draft_length: int = 4

    def __post_init__(self) -> None:
        for name in ("num_drafts", "draft_length"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} is not allowed; give a number >= 1")
            check(name, getattr(self, name), Drafts)
        if isinstance(self.verifier, SingleDraftVerifier) and self.num_drafts > 1:
            raise InputError(
                f"the verifier 'single' takes one draft, not {self.num_drafts}; set num_drafts=1, or use 'kseq', "
                "'rrs', 'rrs-without' or 'greedy'"
            )

    def loop(
        self,
        engine: TreeEngine,
        job: Job,
        tokenizer: PreTrainedTokenizerBase | None = None,
        plugins: Plugins = NO_PLUGINS,
    ) -> SpeculativeLoop:
        """The decode loop that drafts."""
        return SpeculativeLoop(self, engine, job, tokenizer, plugins)


class Emitted(NamedTuple):
    """A token that came out, with the scores that a rewind may draw another one from."""

    token: int
    scores: Tensor
    logits: Tensor  # as the model gave them


class SpeculativeLoop(DecodeLoop):
    """The decode loop with several tokens per forward. Takes a `Speculation` and the arguments of `DecodeLoop`.

    Greedy decoding drafts the most probable tokens and takes the target's; every verifier would do the same. The engine
    needs `forward_tree` and `commit`.
    """

    engine: TreeEngine

    def __init__(
        self,
        speculation: Speculation,
        engine: TreeEngine,
        job: Job,
        tokenizer: PreTrainedTokenizerBase | None = None,
        plugins: Plugins = NO_PLUGINS,
    ) -> None:
        super().__init__(engine, job, tokenizer, plugins)
        self.speculation, self.stats = speculation, SpeculativeStats()
        self.drafter, self.verifier = speculation.drafter, speculation.verifier
        self.independent = self.do_sample and self.verifier.sampling == "with"

    def _written(self) -> SpeculativeOutput:
        return SpeculativeOutput(**{**super()._written(), "stats": self.stats})

    def _prefill(self) -> None:
        distinct = self.speculation.num_drafts > 1 and not self.independent
        self.drafter.begin(self.engine.model, self.batch, distinct)
        super()._prefill()

    def _advance(self) -> None:
        self._speculate()

    def _free(self, row: SequenceState) -> None:
        super()._free(row)
        if isinstance(self.drafter, CachedDrafter):
            self.drafter.free(row.number)

    def _speculate(self) -> None:
        """Draft, feed the trees of all rows, and let every row go along its own as far as the verifier says."""
        trees = self._draft()
        active = [row for row in self.rows if row.number in self.active]
        self.stats.target_calls += len(active)
        self.stats.drafted += sum(map(len, trees))
        if not any(map(len, trees)):
            self._feed_pending()
            self.stats.emitted += len(active)
            return
        pending = [row.ids[row.fed :] if row.number in self.active else [] for row in self.rows]
        tokens, mask = left_padded([new + tree.tokens for new, tree in zip(pending, trees)], self.device)
        width = tokens.shape[1]
        logits = self.engine.forward_tree(tokens, mask, block_parents(pending, trees, width))
        kept: list[list[int]] = [[] for _ in self.rows]
        steps: dict[int, list[Emitted]] = {}
        for row in active:
            tree, new = trees[row.number], pending[row.number]
            first = width - len(tree)  # column of node 0
            steps[row.number], nodes = self._walk(row, tree, logits[row.number, first - 1 :])
            kept[row.number] = [*range(first - len(new), first), *(first + node for node in nodes)]
            row.fed = len(row.ids) + len(nodes)
        self.engine.commit(kept)
        for row in active:
            self._commit(row, steps[row.number])
        self.active = {row.number for row in self.rows if not row.finished}

    # --- drafting ------------------------------------------------------------------------------------------

    def _draft(self) -> list[DraftTree]:
        """Grow a tree for each row, level by level. The last token of a row's budget needs no draft."""
        trees = [DraftTree() for _ in self.rows]
        depths = [
            max(0, min(self.speculation.draft_length, self._room(row) - 1, self._drafter_room(row)))
            if row.number in self.active
            else 0
            for row in self.rows
        ]
        if not any(depths):
            return trees
        found = self.drafter.root([row.prompt + row.ids if depth else None for row, depth in zip(self.rows, depths)])
        self._check_scores(found)
        scores: Sequence[Tensor] = list(found[:, None])
        level = [[ROOT] if depth else [] for depth in depths]
        for depth in range(int(max(depths))):
            grown = [self._branch(row, trees[row.number], level[row.number], scores[row.number]) for row in self.rows]
            level = [
                [node for node in nodes if tree.tokens[node] not in self.eos] if depth + 1 < most else []
                for nodes, tree, most in zip(grown, trees, depths)
            ]
            if not any(level):
                break
            scores = self.drafter.extend(trees, level)
        return trees

    def _branch(self, row: SequenceState, tree: DraftTree, nodes: list[int], scores: Tensor) -> list[int]:
        """Draw the children of these nodes; returns them."""
        if not nodes:
            return []
        distributions = self._distributions(row, [tree.path(node) for node in nodes], scores)
        if self.independent:
            counts = [self.speculation.num_drafts if node == ROOT else tree.copies(node) for node in nodes]
        else:
            counts = slots([tree.weights[node] for node in nodes], distributions, self.speculation.num_drafts)
        grown: list[int] = []
        for node, distribution, count, most in zip(nodes, distributions, counts, distributions.amax(-1).tolist()):
            if count and most > 0:
                grown += tree.add(node, self._draw(row, distribution, count), distribution)
        return grown

    def _distributions(self, row: SequenceState, paths: list[list[int]], scores: Tensor) -> Tensor:
        """The distributions (paths, vocabulary) that drafts are drawn from; zeros where there is nothing to draw."""
        if bool(torch.isnan(scores).any()):
            raise InputError("the drafter's scores are not numbers (NaN); give logits or log-probabilities")
        return torch.stack([self._distribution(row, path, one) for path, one in zip(paths, scores)])

    def _distribution(self, row: SequenceState, path: list[int], scores: Tensor) -> Tensor:
        """The distribution (vocabulary,) of drafts after a path. Processors may leave nothing of it, if they forbid
        the only token that a drafter proposes, or no number where -inf meets inf: then that is not drafted."""
        if not bool((scores > -torch.inf).any()):
            return torch.zeros_like(scores)
        ids = torch.cat([self._row_ids(row), torch.tensor([path], dtype=torch.long, device=self.device)], 1)
        processed = _finite(self._processed(row, ids, scores[None]))
        warped = _finite(self.sampler.warp(ids, processed))[0]
        return warped.softmax(-1).nan_to_num(nan=0.0)

    def _draw(self, row: SequenceState, distribution: Tensor, count: int) -> list[int]:
        if not self.do_sample:
            return distribution.topk(count).indices.tolist()
        return sample_drafts(distribution, count, self.verifier.sampling, self._generator(row))[0]

    # --- verifying -----------------------------------------------------------------------------------------

    def _walk(self, row: SequenceState, tree: DraftTree, logits: Tensor) -> tuple[list[Emitted], list[int]]:
        """Go from the root along drafted tokens until another one comes out; returns what came out, and the nodes gone
        through. `logits` (1 + nodes, vocabulary): after the row, then after each node."""
        steps: list[Emitted] = []
        nodes: list[int] = []
        node, end, room = ROOT, self.prompt_length + len(row.ids), self._room(row)
        while True:
            ids = self.ids[row.number : row.number + 1, : end + len(steps)]
            scores = self._processed(row, ids, logits[node + 1][None])
            token = self._select(row, self.sampler.warp(ids, scores)[0], tree, node, len(steps))
            steps.append(Emitted(token, scores[0], logits[node + 1]))
            node = tree.child(node, token)
            if node is None or token in self.eos or len(steps) == room:
                return steps, nodes
            self.ids[row.number, end + len(steps) - 1] = token
            nodes.append(node)

    def _select(self, row: SequenceState, warped: Tensor, tree: DraftTree, node: int, depth: int) -> int:
        """The token after a node."""
        drafted = tree.drafted(node)
        if not self.do_sample:
            token = int(warped.argmax())
            explicitly = token in drafted
        elif drafted:
            distribution = tree.distributions[node]
            token, explicitly = self.verifier.select(warped.softmax(-1), distribution, drafted, self._generator(row))
        else:
            token = int(torch.multinomial(warped.softmax(-1), 1, generator=self._generator(row)))
        if drafted:
            self.stats.positions.append(Position(depth, token in drafted, explicitly))
        return token

    def _commit(self, row: SequenceState, steps: list[Emitted]) -> None:
        """Append token by token, as monitors expect it; what follows a rewind or an end is dropped."""
        for token, scores, logits in steps:
            before = len(self.events)
            self._accept(row, token, scores, logits)
            self._write(row, len(row.ids) - 1)
            self._repair(row)
            self.stats.emitted += 1
            if row.finished or any(event.kind == "rewind" for event in self.events[before:]):
                break
        ahead = row.fed - (len(row.ids) - 1)  # the last token is fed with the next block
        if ahead > 0:
            self.engine.rollback(row.number, ahead)
            row.fed -= ahead
        self._emit(row)

    # --- small pieces --------------------------------------------------------------------------------------

    def _room(self, row: SequenceState) -> int:
        return self.limits[row.number] - len(row.ids)

    def _drafter_room(self, row: SequenceState) -> float:
        """How deep the drafter can draft after this row before it runs out of positions."""
        positions = self.drafter.positions if isinstance(self.drafter, CachedDrafter) else None
        return float("inf") if positions is None else positions + 1 - len(row.prompt) - len(row.ids)

    def _generator(self, row: SequenceState) -> torch.Generator | None:
        return self.sampler.generators[row.number] if self.sampler.generators else None

    def _check_scores(self, scores: Any) -> None:
        size = self.engine.model.config.get_text_config().vocab_size
        if not isinstance(scores, Tensor) or scores.shape != (self.batch, size):
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise InputError(
                f"the drafter returned {shape} and no scores of shape {(self.batch, size)}; a verifier needs the "
                "distribution that drafts are drawn from"
            )


def _finite(scores: Tensor) -> Tensor:
    """Scores of drafts without what no softmax can take."""
    return scores.nan_to_num(nan=-torch.inf, posinf=torch.finfo(scores.dtype).max, neginf=-torch.inf)


def block_parents(pending: Sequence[Sequence[int]], trees: Sequence[DraftTree], width: int) -> np.ndarray:
    """The parents (rows, width) in blocks that end with the tree, after the tokens that are not fed yet."""
    parents = np.full((len(trees), width), -1)
    for row, (new, tree) in enumerate(zip(pending, trees)):
        first = width - len(tree)  # column of node 0; ROOT is the column before
        start = first - len(new)
        parents[row, start:first] = [-1, *range(start, first - 1)] if new else []
        parents[row, first:] = [first + parent for parent in tree.parents]
    return parents


# --- how it is called ----------------------------------------------------------------------------------------------


def make_verifier(verifier: str | Verifier, gamma: float | Literal["optimal"]) -> Verifier:
    """A verifier by its name, or as it is."""
    if gamma != "optimal":
        if verifier != "kseq":
            raise InputError(f"gamma={gamma} is of the verifier 'kseq'; leave it out for {verifier!r}")
        return KSeqVerifier(gamma)
    if not isinstance(verifier, str):
        return verifier
    if verifier not in VERIFIERS:
        raise InputError(f"there is no verifier {verifier!r}; use one of {', '.join(VERIFIERS)}")
    return VERIFIERS[verifier]


@hands_on_to(loop, "speculation")
def speculative(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: Sequence[Any],
    generation_config: GenerationConfig,
    drafter: str | PreTrainedModel | Drafter = "prompt-lookup",
    verifier: str | Verifier = "kseq",
    num_drafts: int = 8,
    draft_length: int = 4,
    gamma: float | Literal["optimal"] = "optimal",
    exit_layers: int | None = None,
    **options: Any,
) -> DecodeOutput | DecodeLoop | Tensor:
    """Speculative decoding as a `custom_generate` callable; the arguments are those of `Spectr` and of the decode loop.

    `drafter` may also be a model with the same vocabulary, or any `Drafter`, and `verifier` any `Verifier`. With
    `return_dict_in_generate=True` returns a `SpeculativeOutput`.
    """
    plan = Speculation(
        make_drafter(drafter, model, exit_layers), make_verifier(verifier, gamma), num_drafts, draft_length
    )
    return loop(model, input_ids, logits_processor, stopping_criteria, generation_config, speculation=plan, **options)
