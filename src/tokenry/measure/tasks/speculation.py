"""The task `speculation`: problems solved with and without drafts, and the distribution of short continuations.

The problems say what drafting saves and whether the answers stay as good. The continuations of one prefix, drawn many
times, say whether the text keeps the model's distribution: that one is known exactly, by going through all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.problems import Arithmetic, Problem, draw_problems
from ...decode.api import generate, loop
from ...decode.speculation.acceptance import optimal_acceptance
from ...decode.speculation.loop import Speculation, SpeculativeOutput
from ...decode.speculation.verifiers import Sampling, Selection, Verifier
from ...models.prompts import encode_prompts
from ..cost import Meter
from ..task import Arm, Metric, Outcome, Sample, Statistic
from .generated import generation_cost

__all__ = ["EFFICIENCY", "RecordingVerifier", "SpeculationTask", "continuation_distribution", "uncertain_prefix"]

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0}
MAX_NEW_TOKENS = 256
LENGTH, ROWS = 3, 250  # tokens of a continuation, and how many are drawn at a time
LAW = "law"  # kind of sample


class RecordingVerifier:
    """Hands on to a verifier, and keeps the distributions and the number of drafts that it met."""

    def __init__(self, verifier: Verifier) -> None:
        self.verifier = verifier
        self.sampling: Sampling = verifier.sampling
        self.met: list[tuple[Tensor, Tensor, int]] = []

    def select(
        self, target: Tensor, draft: Tensor, tokens: Sequence[int], generator: torch.Generator | None
    ) -> Selection:
        self.met.append((target, draft, len(tokens)))
        return self.verifier.select(target, draft, tokens, generator)

    def ceilings(self) -> list[float]:
        """The highest acceptance rate of any lossless verifier, at each position met."""
        found = [0.0] * len(self.met)
        for count in {count for _, _, count in self.met}:
            where = [i for i, (_, _, k) in enumerate(self.met) if k == count]
            targets, drafts = (torch.stack(side) for side in zip(*(self.met[i][:2] for i in where)))
            for i, value in zip(where, optimal_acceptance(targets, drafts, count, self.sampling).tolist()):
                found[i] = value
        return found


def tokens_per_forward(table: Mapping[str, np.ndarray]) -> float:
    """Over all samples together; NaN without a forward."""
    calls = np.nansum(table["target_calls"])
    return float(np.nansum(table["emitted"]) / calls) if calls else float("nan")


EFFICIENCY = Statistic(
    "block_efficiency", "higher", "tokens for each forward pass of the target after the prompt's", tokens_per_forward
)


class SpeculationTask:
    """Arithmetic problems at temperature 1, one at a time, and draws of short continuations.

    An arm's `apply` is a `Speculation`, or None for plain decoding.
    """

    slug: ClassVar[str] = "speculation"
    stage: ClassVar[str] = "decode"
    metrics: ClassVar[Sequence[Metric]] = (
        Metric("accuracy", "higher", "share of problems answered rightly"),
        Metric("acceptance", "higher", "share of positions with drafts where a drafted token came out"),
        Metric("ceiling", None, "the highest acceptance that any verifier can have on the drafts met"),
        Metric("emitted", None, "tokens after the first"),
        Metric("target_calls", None, "forward passes of the target after the prompt's"),
    )

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, draws: int, prefix: list[int]
    ) -> None:
        self.model, self.tokenizer, self.prefix, self.task = model, tokenizer, prefix, Arithmetic()
        self.setting = {"prefix": prefix}
        self.problems = {problem.id: problem for problem in draw_problems(self.task, count)}
        self.draws = -(-draws // ROWS)

    def samples(self) -> list[Sample]:
        problems = [
            Sample(problem.id, problem.question, {"index": i}) for i, problem in enumerate(self.problems.values())
        ]
        shown = cast(str, self.tokenizer.decode(self.prefix))
        return [*problems, *(Sample(f"{LAW}-{i}", shown, {"index": i, "kind": LAW}) for i in range(self.draws))]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        return [
            self._draw(arm.apply, 1_000 * seed + sample.data["index"])
            if sample.data.get("kind") == LAW
            else self._solve(arm.apply, self.problems[sample.id], 100_000 * seed + sample.data["index"])
            for sample in samples
        ]

    def _solve(self, plan: Speculation | None, problem: Problem, seed: int) -> Outcome:
        options = {**SAMPLING, "max_new_tokens": MAX_NEW_TOKENS, "seed": seed, "return_dict_in_generate": True}
        inputs = encode_prompts(self.tokenizer, problem.question).to(self.model.device)
        recorder, checked = None, plan
        if plan:
            recorder = RecordingVerifier(plan.verifier)
            checked = Speculation(plan.drafter, recorder, plan.num_drafts, plan.draft_length)
        with Meter() as meter:
            output = cast(Any, self.model).generate(
                **inputs, custom_generate=loop, speculation=checked, processing_class=self.tokenizer, **options
            )
        ids = output.new_ids[0]
        right = ids[-1] == self.tokenizer.eos_token_id and self.task.check(problem, output.texts[0])
        metrics, positions = {"accuracy": float(right)}, []
        if recorder:
            metrics["emitted"], metrics["target_calls"] = output.stats.emitted, output.stats.target_calls
            ceilings = recorder.ceilings()
            positions = [[p.depth, int(p.taken), round(c, 5)] for p, c in zip(output.stats.positions, ceilings)]
            if positions:
                metrics["acceptance"], metrics["ceiling"] = np.array(positions, float)[:, 1:].mean(0).tolist()
        else:
            metrics["emitted"] = metrics["target_calls"] = float(len(ids) - 1)
        note = f"level {problem.difficulty}: {'right' if right else 'wrong'}; {output.texts[0]!r}"
        return Outcome(metrics, generation_cost(output, 0, meter), {"note": note, "positions": positions})

    def _draw(self, plan: Speculation | None, seed: int) -> Outcome:
        ids = torch.tensor([self.prefix] * ROWS, device=self.model.device)
        out = cast(Any, self.model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            custom_generate=loop,
            speculation=plan,
            seed=seed,
            max_new_tokens=LENGTH + 1,
            return_dict_in_generate=True,
            **SAMPLING,
        )
        return Outcome({}, {}, {"continuations": [new[:LENGTH] for new in out.new_ids]})


@torch.no_grad()
def uncertain_prefix(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 30) -> list[int]:
    """Ids of a text of the model that ends one token before the place where it is least certain of the next one; of
    `count` solutions of problems kept apart from training and from reports."""
    problems = draw_problems(Arithmetic(), count, split="dev")
    questions, options = [p.question for p in problems], {"max_new_tokens": MAX_NEW_TOKENS, **SAMPLING}
    out = cast(SpeculativeOutput, generate(model, tokenizer, questions, seed=0, **options))
    best, found = -1.0, []
    for prompt, new in zip(out.prompt_ids, out.new_ids):
        ids = prompt + new
        distribution = (
            model(torch.tensor([ids], device=model.device), use_cache=False).logits[0].float().log_softmax(-1)
        )
        entropy = -(distribution.exp() * distribution).sum(-1)[len(prompt) : -1]
        if len(entropy) and float(entropy.max()) > best:
            best, found = float(entropy.max()), ids[: len(prompt) + int(entropy.argmax())]
    return found


@torch.no_grad()
def continuation_distribution(model: PreTrainedModel, prefix: Sequence[int]) -> Mapping[tuple[int, ...], float]:
    """The exact probability of every continuation of LENGTH tokens, or fewer where the text ends, that has more than
    one in a million."""
    distribution: dict[tuple[int, ...], float] = {}
    growing: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        known = list(growing)
        ids = torch.tensor([[*prefix, *new] for new in known], device=model.device)
        rows = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].double().softmax(-1).tolist()
        longer = ((new, token, growing[new] * p) for new, row in zip(known, rows) for token, p in enumerate(row))
        growing = {(*new, token): p for new, token, p in longer if p > 1e-6}
        ended = [new for new in growing if new[-1] == model.generation_config.eos_token_id]
        distribution.update({new: growing.pop(new) for new in ended})
    return distribution | growing


def chi_square(drawn: Sequence[Sequence[int]], distribution: Mapping[tuple[int, ...], float]) -> dict[str, Any]:
    """Pearson's statistic of draws against a distribution, its degrees of freedom and the p value; what is expected
    less than five times is one cell."""
    counts: dict[tuple[int, ...], int] = {}
    for new in map(tuple, drawn):
        counts[new] = counts.get(new, 0) + 1
    total = len(drawn)
    common = [new for new, p in distribution.items() if p * total >= 5]
    observed = np.array([counts.get(new, 0) for new in common], float)
    expected = np.array([distribution[new] * total for new in common])
    rest = total - expected.sum()
    if rest >= 1:
        observed, expected = np.append(observed, total - observed.sum()), np.append(expected, rest)
    statistic, freedom = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return {"statistic": statistic, "freedom": freedom, "p": float(torch.special.gammaincc(half[0], half[1]))}
