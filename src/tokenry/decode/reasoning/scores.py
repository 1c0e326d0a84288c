"""Scores of reasoning steps: what a judge says, and two judges that are models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...models.positions import check_prompt_fits
from ...text.words import listed
from .step_prompts import Messages, StepPrompts, prompts_for

__all__ = ["DigitScorer", "LikelihoodScorer", "StepScore", "StepScorer"]

LOWEST, HIGHEST = 0, 9
TOP = 10  # most probable tokens among which "average" looks for digits


@dataclass(frozen=True)
class StepScore:
    """What a step is worth. `probs` are the probabilities of the digits of the scale, where digits were asked for."""

    value: float
    probs: Tensor | None = None
    kind: str = ""


class StepScorer(Protocol):
    """Judges a candidate for the next step."""

    def score(self, problem: Messages, steps: Sequence[str], candidate: str) -> StepScore: ...


class DigitScorer:
    """Asks a model for a score and reads one digit off its logits.

    Args:
        scale: lowest and highest score; every number between must be one token.
        method: "greedy" takes the most probable token, and the lowest score if that is no digit; "average" the mean of
            the digits among the ten most probable tokens, weighted; "digits" the same over all digits.
        prompts: the words; those of the reasoner, so that its cache can be used.

    Raises:
        InputError: a scale that is none or has a number of more than one token, an unknown method, no chat template.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        scale: tuple[int, int] = (LOWEST, HIGHEST),
        method: Literal["greedy", "average", "digits"] = "greedy",
        prompts: StepPrompts | None = None,
    ) -> None:
        if not 0 <= scale[0] < scale[1]:
            raise InputError(f"scale={scale} is not allowed; give the lowest and the highest score, such as (0, 9)")
        if method not in ("greedy", "average", "digits"):
            raise InputError(f"method={method!r} is unknown; use 'greedy', 'average' or 'digits'")
        self.model, self.tokenizer, self.kind = model, tokenizer, method
        self.prompts = prompts or prompts_for(model)
        self.lowest = scale[0]
        self.ids = [_digit_ids(tokenizer, number) for number in range(scale[0], scale[1] + 1)]

    @torch.no_grad()
    def score(self, problem: Messages, steps: Sequence[str], candidate: str) -> StepScore:
        text = self.prompts.judging(self.tokenizer, problem, steps, candidate)
        ids = self.tokenizer.encode(text, add_special_tokens=not self.prompts.chat, return_tensors="pt")
        check_prompt_fits(self.model, ids.shape[1] - 1)
        return self.read(self.model(ids.to(self.model.device), use_cache=False).logits[0, -1])

    def read(self, logits: Tensor) -> StepScore:
        """The score from the logits (vocab,) of the place where it stands."""
        every = logits.float().softmax(-1)
        probs = torch.stack([every[ids].sum() for ids in self.ids])
        if self.kind == "greedy":
            best = int(every.argmax())
            found = next((i for i, ids in enumerate(self.ids) if best in ids), 0)
            return StepScore(float(self.lowest + found), probs, self.kind)
        counted = probs
        if self.kind == "average":
            top = set(every.topk(min(TOP, every.numel())).indices.tolist())
            counted = torch.stack([every[[i for i in ids if i in top]].sum() for ids in self.ids])
        numbers = torch.arange(self.lowest, self.lowest + len(self.ids), device=probs.device)
        mass = float(counted.sum())
        value = float((counted * numbers).sum()) / mass if mass > 0 else float(self.lowest)
        return StepScore(value, probs, self.kind)


class LikelihoodScorer:
    """Scores a step by what a model would have written itself: the probability, times nine, of its least probable
    token, the separator included.

    Not of the paper. It asks for no skill in judging, but a step in unusual words gets a low score. Every text is read
    anew.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: StepPrompts | None = None
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.prompts = prompts or prompts_for(model)

    @torch.no_grad()
    def score(self, problem: Messages, steps: Sequence[str], candidate: str) -> StepScore:
        separator, special = self.prompts.separator, not self.prompts.chat
        body = "".join(step + separator for step in listed(steps, "step"))
        before = self.prompts.begin(self.tokenizer, problem) + body
        known = self.tokenizer.encode(before, add_special_tokens=special)
        whole = self.tokenizer.encode(before + candidate + separator, add_special_tokens=special)
        first = next((i for i, (a, b) in enumerate(zip(known, whole)) if a != b), len(known))
        check_prompt_fits(self.model, len(whole) - 1)
        ids = torch.tensor([whole], device=self.model.device)
        logits = self.model(ids[:, :-1], use_cache=False).logits[0, first - 1 :].float()
        probs = logits.softmax(-1).gather(1, ids[0, first:, None])
        return StepScore(HIGHEST * float(probs.min()), None, "likelihood")


def _digit_ids(tokenizer: PreTrainedTokenizerBase, number: int) -> list[int]:
    """The tokens that say this number, alone or after a space."""
    text = str(number)
    forms = [tokenizer.encode(form, add_special_tokens=False) for form in (text, f" {text}")]
    ids = {form[0] for form in forms if len(form) == 1} | {tokenizer.convert_tokens_to_ids(text)}
    found = sorted(i for i in ids if isinstance(i, int) and tokenizer.decode([i]).strip() == text)
    if not found:
        raise InputError(f"the score scale needs one token per digit; {text!r} is not one token of this vocabulary")
    return found
