"""SpecReason: a small model writes each step, the base model scores it, and rewrites it if the score is too low.

Paper: SpecReason: Fast and Accurate Inference-Time Compute via Speculative Reasoning, arXiv 2504.07891. Speculation on
steps instead of tokens: a step may say the same in other words, so more of it is kept, and the text is no longer that
of the base model. The base model reads many tokens at a time where it would have written one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..core.claim import Claim
from ..core.errors import InputError
from ..core.fields import Times, Tokens
from ..core.method import Local
from ..models.batch import pad_id
from ..models.load import Loaded, shared
from ..models.prompts import listed_prompts
from .contract import Call, DecodeMethod, RunnerMethod, refuse_others
from .generation.options import ending
from .generation.output import UNSET, DecodeOutput
from .reasoning.scores import DigitScorer, LikelihoodScorer, StepScorer
from .reasoning.speculative import ReasoningResult, SpeculativeReasoner, StepSpeculation, check_threshold
from .reasoning.step_prompts import Messages, StepPrompts, prompts_for, read_prompts

__all__ = ["SpecReason", "SpecReasonOutput"]


class SpecReason(RunnerMethod):
    """A small model writes each step, the base model scores it, and rewrites it if the score is too low."""

    slug: ClassVar[str] = "specreason"
    title: ClassVar[str] = "SpecReason"
    paper: ClassVar[str] = (
        "SpecReason: Fast and Accurate Inference-Time Compute via Speculative Reasoning, arXiv 2504.07891"
    )
    claim: ClassVar[str] = (
        "A small model writes most reasoning steps and the base model judges them: it writes less than half as many "
        "tokens, at equal or better accuracy."
    )
    published: ClassVar[Claim] = Claim(
        "1.4 to 3.0",
        "times faster, accuracy +0.4 to +9.0 points",
        "QwQ-32B with R1-Distill-Qwen-1.5B, AIME, MATH-500, GPQA",
        "specreason-reasoner-2",
    )

    small: Annotated[Any, Local(), WithJsonSchema({"type": "string"})] = Field(
        default="zoo/speculator",
        description="the small model: a name or folder as for --model, or in Python what tokenry.load returns",
    )
    threshold: float = Field(
        default=7.0, ge=-100, le=100, description="lowest score of 0 to 9 at which a step of the small model is kept"
    )
    score_method: Literal["greedy", "average", "digits", "likelihood"] = Field(
        default="greedy",
        description="the score: the likeliest token where a digit is asked for, the mean of likely digits or of all "
        "digits; or 9 times the probability of the step's least probable token",
    )
    first_n_base_steps: Times = Field(default=0, description="steps at the beginning that the base model writes")
    max_step_tokens: Tokens = Field(default=512, description="most tokens of a step")
    prompts: Annotated[
        StepPrompts | None, Local(), BeforeValidator(read_prompts), WithJsonSchema({"type": "string"})
    ] = Field(
        default=None,
        description="the words around the steps: chat, lines (zoo/reasoner) or JSON; none for what fits the model",
    )

    @field_validator("threshold")
    @classmethod
    def _is_a_number(cls, threshold: float) -> float:
        check_threshold(threshold)
        return threshold

    def scorer(self, base: Loaded, prompts: StepPrompts) -> StepScorer:
        """The judge: the base model."""
        if self.score_method == "likelihood":
            return LikelihoodScorer(*base, prompts=prompts)
        return DigitScorer(*base, method=self.score_method, prompts=prompts)

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Messages | Sequence[Messages],
        call: Call,
        others: Sequence[DecodeMethod] = (),
    ) -> SpecReasonOutput:
        """Solve problems with `model` as the base model.

        Args:
            prompts: a problem or several, each a text or messages of which the last is the user's.
            call: `max_new_tokens` is the budget of kept tokens; streamers get whole steps. Plug-ins are refused.
        """
        refuse_others(self, others)
        for name, given in {**vars(call.plugins), "stop": call.stop}.items():
            if given:
                raise InputError(f"specreason writes with two models and takes no {name}; leave them out")
        with ending(call.streamers) as streamers:
            return self._run(model, tokenizer, prompts, call, streamers)

    def _run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Messages | Sequence[Messages],
        call: Call,
        streamers: Sequence[BaseStreamer],
    ) -> SpecReasonOutput:
        words = self.prompts or prompts_for(model)
        words = words if call.chat else replace(words, chat=False)
        base = Loaded(model, tokenizer)
        reasoner = SpeculativeReasoner(
            base,
            _loaded(self.small, model),
            self.scorer(base, words),
            threshold=self.threshold,
            max_step_tokens=self.max_step_tokens,
            token_budget=call.max_new_tokens,
            first_n_base_steps=self.first_n_base_steps,
            prompts=words,
            **call.options,
        )
        problems = listed_prompts(prompts, texts_only="specreason reads prompts with two tokenizers")
        return _output(reasoner.run(problems, call.seed, _streaming(streamers, tokenizer, words, problems)))


@dataclass
class SpecReasonOutput(DecodeOutput):
    """A `DecodeOutput` in tokens of the base model, with the `ReasoningResult` of each row."""

    results: list[ReasoningResult] = UNSET


def _loaded(small: Any, model: PreTrainedModel) -> Loaded:
    return shared(small, like=model) if isinstance(small, str | Path) else Loaded(*small)


def _streaming(
    streamers: Sequence[BaseStreamer],
    tokenizer: PreTrainedTokenizerBase,
    prompts: StepPrompts,
    problems: Sequence[Messages],
) -> Callable[[int, str], None] | None:
    """Feeds the streamers the prompts at once and then every kept step."""
    if not streamers:
        return None
    if len(streamers) != len(problems):
        raise InputError(f"{len(streamers)} streamers for {len(problems)} rows; give one streamer per row")

    def put(row: int, text: str) -> None:
        streamers[row].put(torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.long))

    for row, problem in enumerate(problems):
        put(row, prompts.begin(tokenizer, problem))
    return put


def _output(speculation: StepSpeculation) -> SpecReasonOutput:
    """The results in tokens of the base model."""
    results, base = speculation.results(), speculation.base
    ends = [[cast(int, base.tokenizer.eos_token_id)] if r.steps[-1].end == "eos" else [] for r in results]
    ids = [base.tokenizer.encode(r.text, add_special_tokens=False) + end for r, end in zip(results, ends)]
    rows = [start + new for start, new in zip(base.starts, ids)]
    pad = pad_id(base.tokenizer)
    left, longest = max(map(len, base.starts)), max(map(len, ids))
    sequences = torch.full((len(rows), left + longest), pad, device=base.model.device)
    for line, start, row in zip(sequences, base.starts, rows):
        line[left - len(start) : left - len(start) + len(row)] = torch.tensor(row, device=line.device)
    return SpecReasonOutput(
        sequences=sequences,
        new_ids=ids,
        prompt_ids=base.starts,
        texts=[cast(str, base.tokenizer.decode(new, skip_special_tokens=True)) for new in ids],
        events=[],
        forward_calls=base.engine.calls + speculation.small.engine.calls,
        tokens_processed=base.engine.tokens_processed + speculation.small.engine.tokens_processed,
        past_key_values=base.engine.cache,
        stop_reasons=[result.stop_reason for result in results],
        results=results,
    )
