"""DiffAdapt: a probe reads the question, and its class decides prompt, temperature and budget.

Paper: DiffAdapt: Difficulty-Adaptive Reasoning for Token-Efficient LLM Inference, arXiv 2510.19669. Easy questions are
answered directly, normal ones as always, and hard ones get less than normal ones: what is likely to fail should fail
soon. The question is read once; what a strategy adds to the prompt comes after it, so that the cache stays valid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import BeforeValidator, Field, field_validator
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.logits_process import LogitsProcessor, TemperatureLogitsWarper

from ..core.artifact import ArtifactField
from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Probability
from ..learned.difficulty_probe import CLASSES, DifficultyProbe, Prompt, Questions, read_questions
from ..models.batch import left_padded, pad_id, shared_length
from ..models.prompts import listed_prompts, prompt_ids
from .api import generate
from .contract import Call, DecodeMethod, Plan, PlanMethod, Plugins
from .generation.output import DecodeOutput
from .reasoning.strategies import DEFAULT_STRATEGIES, NORMAL, Strategy, read_strategies

__all__ = ["DiffAdapt", "generate_by_strategy", "oracle_strategy"]


class DiffAdapt(PlanMethod):
    """A probe reads the question, and its class decides prompt, temperature and budget."""

    slug: ClassVar[str] = "diffadapt"
    title: ClassVar[str] = "DiffAdapt"
    paper: ClassVar[str] = (
        "DiffAdapt: Difficulty-Adaptive Reasoning for Token-Efficient LLM Inference, arXiv 2510.19669"
    )
    claim: ClassVar[str] = (
        "A small probe on the question's state picks one of three strategies and saves 10 to 20 % of the tokens at "
        "equal accuracy."
    )
    published: ClassVar[Claim] = Claim(
        "22.4 %", "fewer tokens at equal or better accuracy", "Qwen3-4B, the best of five models"
    )

    probe: ArtifactField[DifficultyProbe] | None = Field(
        default=None, description="folder of a probe trained on this model, or in Python the probe itself"
    )
    strategies: Annotated[tuple[Strategy, ...], BeforeValidator(read_strategies)] = Field(
        default=DEFAULT_STRATEGIES,
        description="for easy, normal and hard: a JSON file, a list of objects with name, suffix, temperature, budget",
    )
    min_confidence: Probability = Field(
        default=0.0, description="questions whose best class is less probable are treated as normal"
    )

    @field_validator("probe")
    @classmethod
    def _knows_the_classes(cls, probe: DifficultyProbe | None) -> DifficultyProbe | None:
        if probe is not None and probe.n_classes != len(CLASSES):
            raise InputError(f"the probe has {probe.n_classes} classes; give one that tells {', '.join(CLASSES)}")
        return probe

    @field_validator("strategies")
    @classmethod
    def _one_for_each_class(cls, strategies: tuple[Strategy, ...]) -> tuple[Strategy, ...]:
        names = sorted(strategy.name for strategy in strategies)
        if names != sorted(CLASSES):
            raise InputError(f"the strategies are {', '.join(names) or 'none'}; give one each for {', '.join(CLASSES)}")
        return tuple(sorted(strategies, key=lambda strategy: CLASSES.index(strategy.name)))

    def choose(self, probs: Tensor) -> list[Strategy]:
        """The strategy for each row of probabilities (batch, 3)."""
        best = probs.max(-1)
        sure = best.values >= self.min_confidence
        normal = CLASSES.index(NORMAL)
        return [self.strategies[i if good else normal] for i, good in zip(best.indices.tolist(), sure.tolist())]

    def plan(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompt | Sequence[Prompt],
        call: Call,
    ) -> Plan:
        """Read the questions, and choose a strategy for each.

        Args:
            prompts: a question or several, each a text or messages of which the last is the user's.
            call: `max_new_tokens` is the full budget; sampling is on, and the temperature is the strategy's.

        Raises:
            InputError: no probe, one of another model or template, an empty prompt, a temperature.
        """
        prompts = _as_list(prompts)
        if self.probe is None:
            raise InputError(
                "diffadapt has no probe; train one with `tokenry fit difficulty-probe` and give probe=FOLDER"
            )
        self.probe.check(model, tokenizer, call.chat)
        questions = read_questions(model, tokenizer, prompts, call.chat)
        probs = self.probe.probabilities(questions.states)
        plan = plan_by_strategy(model, tokenizer, prompts, self.choose(probs), call, questions)
        return replace(plan, probs=probs)

    def generate(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompt | Sequence[Prompt],
        *,
        methods: Sequence[DecodeMethod] = (),
        **options: Any,
    ) -> DecodeOutput:
        """`tokenry.generate` with this method and others."""
        return generate(model, tokenizer, prompts, methods=[self, *methods], **options)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    return listed_prompts(prompts, texts_only="diffadapt puts words behind questions before they are encoded")


def generate_by_strategy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    strategies: Sequence[Strategy],
    *,
    max_new_tokens: int = 256,
    questions: Questions | None = None,
    processors: Sequence[LogitsProcessor] = (),
    chat: bool = True,
    **options: Any,
) -> DecodeOutput:
    """Continue each prompt with its own strategy, all in one batch.

    Args:
        strategies: one for each prompt.
        questions: what `read_questions` made of the prompts: then only what follows the questions is fed. The cache in
            it is used up.
        options: the rest is as in `tokenry.generate`, but sampling is on, and the temperature is the strategy's.

    Raises:
        InputError: not one strategy for each prompt, a temperature in `options`, and what `tokenry.generate` refuses.
    """
    call = Call(max_new_tokens=max_new_tokens, chat=chat, options=options)
    plan = plan_by_strategy(model, tokenizer, listed_prompts(prompts), strategies, call, questions)
    output = generate(
        model,
        tokenizer,
        plan.prompts,
        processors=[*processors, *plan.plugins.processors],
        max_new_tokens=max_new_tokens,
        **{**options, **plan.options},
    )
    return plan.finish(output)


def plan_by_strategy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    strategies: Sequence[Strategy],
    call: Call,
    questions: Questions | None = None,
) -> Plan:
    """See `generate_by_strategy`."""
    if len(prompts) != len(strategies):
        raise InputError(f"{len(strategies)} strategies for {len(prompts)} prompts; give one strategy for each prompt")
    if call.options.get("temperature", 1.0) != 1.0:
        raise InputError(f"temperature={call.options['temperature']} is the strategy's to say; set it there")
    if call.options.get("num_return_sequences") not in (None, 1):
        raise InputError("num_return_sequences is not possible with budgets of single prompts; repeat the prompts")
    rows = [prompt_ids(tokenizer, prompt, one.suffix, call.chat) for prompt, one in zip(prompts, strategies)]
    ids, mask, cache = _lay_out(rows, questions, pad_id(tokenizer), model.device)
    return Plan(
        BatchEncoding({"input_ids": ids, "attention_mask": mask}),
        Plugins(processors=[TemperatureByRow(ids, [strategy.temperature for strategy in strategies])]),
        {
            "do_sample": True,
            **call.options,
            "temperature": 1.0,
            "past_key_values": cache,
            "budgets": [strategy.tokens(call.max_new_tokens) for strategy in strategies],
        },
        strategy=[strategy.name for strategy in strategies],
        tokens_read=0 if questions is None else int(questions.mask.sum()),
    )


def _lay_out(
    rows: Sequence[list[int]], questions: Questions | None, pad: int, device: torch.device
) -> tuple[Tensor, Tensor, Any]:
    """Prompts as columns (ids, mask) with the cache of the first ones. Each row is its question, left-padded, and then
    the rest, left-padded too; tokens at the end of a question that the rest has merged with are masked out."""
    if questions is None:
        return *left_padded(rows, device, pad), None
    read = [row[keep.bool()].tolist() for row, keep in zip(questions.ids, questions.mask)]
    shared = [shared_length(question, row) for question, row in zip(read, rows)]
    rests = [row[count:] for row, count in zip(rows, shared)]
    if not all(rests):  # a bare prompt without any suffix: its last token must be fed for its logits
        return *left_padded(rows, device, pad), None
    mask = questions.mask.clone()
    for row, question, count in zip(mask, read, shared):
        row[mask.shape[1] - len(question) + count :] = 0
    ids, after = left_padded(rests, device, pad)
    return torch.cat([questions.ids, ids], 1), torch.cat([mask, after], 1), questions.cache


class TemperatureByRow(TemperatureLogitsWarper):
    """Divides the scores of each row by its own temperature.

    Rows may come all together or alone, as the decode loop has it; alone they are known by their prompts (batch,
    columns).
    """

    def __init__(self, prompts: Tensor, temperatures: Sequence[float]) -> None:
        self.prompts = prompts
        self.temperatures = torch.tensor(temperatures, device=prompts.device)[:, None]
        for prompt in prompts:
            others = {float(t) for t in self.temperatures[(prompts == prompt).all(-1)]}
            if len(others) > 1:
                raise InputError(
                    f"the same prompt is in the batch with temperatures {sorted(others)}; put it in separate batches"
                )

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if len(input_ids) == len(self.prompts):
            return scores / self.temperatures
        same = (input_ids[:, None, : self.prompts.shape[1]] == self.prompts).all(-1)
        return scores / self.temperatures[same.int().argmax(-1)]


def oracle_strategy(table: Mapping[str, tuple[Sequence[bool], Sequence[float]]]) -> list[str]:
    """The cheapest strategy that is right on each question, "normal" where none is: what a perfect choice would reach.

    Args:
        table: {strategy: (right (questions,), tokens (questions,))}; equal tokens go to the one that comes first.
    """
    if NORMAL not in table:
        raise InputError(f"the table has {', '.join(table) or 'nothing'}; it needs at least {NORMAL!r}")
    names = list(table)
    cost = np.array([np.where(np.asarray(right, bool), tokens, np.inf) for right, tokens in table.values()], float)
    best, solved = cost.argmin(0), np.isfinite(cost.min(0))
    return [names[i] if good else NORMAL for i, good in zip(best, solved)]
