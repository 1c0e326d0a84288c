"""The task `depth`: what is left of a model when later tokens run fewer layers, untrained and trained for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.problems import Arithmetic, draw_problems
from ...decode.api import generate
from ...hooks.skip_schedule import SkipSchedule, skip_forward
from ...models.anatomy import decoder_layers
from ...models.load import Loaded
from ..cost import Meter
from ..task import Arm, Metric, Outcome, Sample
from .generated import generation_cost
from .unlearning import ordinary_texts

__all__ = ["DepthTask", "EarlyExit", "RandomLayers", "depths"]

PROMPT, COLUMNS = 60, 190  # tokens of a passage that are read, and of all of it
TEXT_DEPTHS, PROBLEM_DEPTHS = (97, 90, 83, 75, 67), (75, 50)  # average depth in percent
LEVELS, NEW_TOKENS, PLANNED = (2, 3, 4), 120, 24
SPREAD = 1  # layers above and below the average depth, in sums


@dataclass(frozen=True)
class EarlyExit(SkipSchedule):
    """As deep as the schedule, but it is the top layers that do not run."""

    @cached_property
    def needs(self) -> tuple[int, ...]:
        return tuple(range(1, self.num_layers + 1))


@dataclass(frozen=True)
class RandomLayers(SkipSchedule):
    """As deep as the schedule, with the same warm-up, but layers are skipped in a random order, with gaps between."""

    draw: int = 0

    @cached_property
    def needs(self) -> tuple[int, ...]:
        rng, order = Random(f"random layers {self.draw}"), list(range(self.warmup, self.num_layers))
        half = max(self.warmup + 1, (self.num_layers + 1) // 2)
        while True:  # until those left out at half depth are no block
            rng.shuffle(order)
            skipped = sorted(order[half - self.warmup :])
            if len(skipped) < 2 or skipped[-1] - skipped[0] >= len(skipped):
                break
        rank = {layer: i for i, layer in enumerate(order)}
        return tuple(self.warmup + 1 + rank[i] if i in rank else 1 for i in range(self.num_layers))


def depths(layers: int, average: int, spread: int | None = None) -> tuple[int, int]:
    """The `e_max` and `e_min` between which depth is `average` percent of the layers: as many layers more and fewer as
    `spread`, or from all of them down."""
    middle = layers * average / 100
    most = layers if spread is None else round(middle) + spread
    return most, round(2 * middle - most)


class _AnyPrompt:
    """A schedule as a layer policy, for prompts of any length."""

    def __init__(self, schedule: SkipSchedule) -> None:
        self.schedule = schedule

    def begin(self, prompt_columns: int, new_columns: int | None) -> None:
        self.schedule = replace(self.schedule, prompt_len=prompt_columns)

    def layers(self, column: int) -> frozenset[int]:
        return self.schedule.layers(column)


class DepthTask:
    """Two kinds of samples; a metric that does not belong to a sample's kind is missing there.

    * passages of ordinary text: nats per token behind the first 60, with depth falling to the end;
    * sums that the reasoner of the zoo solves: whether the answer is right, before and after training.

    A seed is that of training; texts, and models before it, are measured with the first one. An arm's `apply` is
    {"schedule": a function of layers, average depth, columns of the prompt, planned tokens and, for sums, the spread of
    depth; "trained": {seed: model}, for an arm that takes part in sums}.
    """

    slug: ClassVar[str] = "depth"
    stage: ClassVar[str] = "decode"
    metrics: ClassVar[Sequence[Metric]] = (
        *(
            Metric(f"nll_{d}", "lower", f"nats per token of a text, not trained, planned average depth {d}%")
            for d in TEXT_DEPTHS
        ),
        *(Metric(f"untrained_{d}", "higher", f"sums solved, planned average depth {d}%") for d in PROBLEM_DEPTHS),
        *(Metric(f"trained_{d}", "higher", f"sums solved after training, planned at {d}%") for d in PROBLEM_DEPTHS),
        *(Metric(f"depth_{d}", None, f"average depth that was run, of 1, planned {d}%") for d in PROBLEM_DEPTHS),
    )

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        reasoner: Loaded,
        first: int = 0,
        texts: int = 12,
        problems: int = 240,
    ) -> None:
        self.model, self.tokenizer, self.reasoner, self.first = model, tokenizer, reasoner, first
        self.texts = ordinary_texts(texts)
        self.problems = draw_problems(Arithmetic(), problems, levels=LEVELS)

    def samples(self) -> list[Sample]:
        texts = [Sample(f"text-{i:02}", text) for i, text in enumerate(self.texts)]
        return texts + [Sample(p.id, p.question, {"problem": p}) for p in self.problems]

    def run(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        texts = [s for s in samples if "problem" not in s.data]
        problems = [s for s in samples if "problem" in s.data]
        found = dict(zip([s.id for s in texts], self._texts(arm, texts))) if texts and seed == self.first else {}
        if problems and arm.apply["trained"]:
            found |= zip([s.id for s in problems], self._problems(arm, problems, seed))
        return [found.get(s.id, Outcome({})) for s in samples]

    # --- texts ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _texts(self, arm: Arm, samples: Sequence[Sample]) -> list[Outcome]:
        cut = {"truncation": True, "max_length": COLUMNS, "return_tensors": "pt"}
        ids = torch.cat([self.tokenizer(s.prompt, **cut).input_ids for s in samples]).to(self.model.device)
        layers, schedule = len(decoder_layers(self.model)), arm.apply["schedule"]
        columns: dict[str, list[float]] = {}
        for average in TEXT_DEPTHS:
            made = schedule(layers, average, PROMPT, COLUMNS - PROMPT)
            if columns and made.e_min == layers:  # the plain model is the same at every depth
                columns[f"nll_{average}"] = next(iter(columns.values()))
                continue
            logits = skip_forward(self.model, ids, made.mask(COLUMNS))["logits"][:, PROMPT - 1 : -1].float()
            nll = -logits.log_softmax(-1).gather(2, ids[:, PROMPT:, None]).mean((1, 2))
            columns[f"nll_{average}"] = nll.tolist()
        return [Outcome({name: column[i] for name, column in columns.items()}) for i in range(len(samples))]

    # --- problems ------------------------------------------------------------------------------------------

    def _problems(self, arm: Arm, samples: Sequence[Sample], seed: int) -> list[Outcome]:
        outcomes = [Outcome({}) for _ in samples]
        models = {"untrained": self.reasoner.model} if seed == self.first else {}
        models["trained"] = arm.apply["trained"][seed]
        for state, model in models.items():
            for average in PROBLEM_DEPTHS:
                self._solve(model, arm.apply["schedule"], average, state, samples, outcomes)
        return outcomes

    def _solve(
        self,
        model: PreTrainedModel,
        schedule: Callable[..., SkipSchedule],
        average: int,
        state: str,
        samples: Sequence[Sample],
        outcomes: Sequence[Outcome],
    ) -> None:
        layers = len(decoder_layers(model))
        policy = _AnyPrompt(schedule(layers, average, 1, PLANNED, SPREAD))
        with Meter() as meter:
            output = generate(
                model,
                self.reasoner.tokenizer,
                [s.prompt for s in samples],
                layer_policy=policy,
                max_new_tokens=NEW_TOKENS,
            )
        first = policy.schedule.prompt_len
        for b, (sample, outcome) in enumerate(zip(samples, outcomes)):
            right = Arithmetic().check(sample.data["problem"], output.texts[b])
            outcome.metrics[f"{state}_{average}"] = float(right)
            run = [policy.schedule.depth(first + i) for i in range(len(output.new_ids[b]))]
            outcome.metrics[f"depth_{average}"] = sum(run) / len(run) / layers
            outcome.cost = generation_cost(output, b, meter)
            outcome.detail = {"text": output.texts[b]}
