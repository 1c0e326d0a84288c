"""The model's own samples of questions: how sure it was, how often right, how long, by level of difficulty.

Paper: DiffAdapt: Difficulty-Adaptive Reasoning for Token-Efficient LLM Inference, arXiv 2510.19669. There the entropy
of the samples is high on easy, low on medium and high on hard questions; `EntropyProfile.plot` shows what it is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...core.progress import Progress
from ...models.positions import check_prompt_fits
from ...models.prompts import Prompt, listed_prompts, prompt_ids
from ..contract import Reading

__all__ = ["EntropyProfile", "entropy_profile", "token_entropy"]

BAR = 24  # characters of the longest bar


# --- entropy -------------------------------------------------------------------------------------------------------


def step_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits), over the last dimension, in float32; impossible tokens (-inf) count 0."""
    logprob = logits.float().log_softmax(-1)
    return -(logprob.exp() * logprob.masked_fill(logprob.isneginf(), 0.0)).sum(-1)


def token_entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean entropy in nats (batch,) of logits (batch, time, vocab) over the tokens where mask (batch, time) is true.

    Raises:
        InputError: a row without any token.
    """
    return _masked_mean(step_entropy(logits), mask)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    mask = mask.bool()
    if not bool(mask.any(-1).all()):
        raise InputError(f"row {int((~mask.any(-1)).nonzero()[0])} has no token, so no entropy; leave it out")
    return values.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)


class StepEntropies(LogitsProcessor):
    """Keeps the entropy of every distribution it sees. It stands before temperature and truncation, which lower it."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps.append(step_entropy(scores))
        return scores


# --- the profile ---------------------------------------------------------------------------------------------------


class Level(NamedTuple):
    """Means over the questions of one level, with the 95 % bootstrap interval of the entropy."""

    questions: int
    entropy: float
    low: float
    high: float
    correctness: float
    tokens: float


@dataclass(frozen=True)
class EntropyProfile:
    """What the samples of each question say: arrays (questions,).

    Attributes:
        entropy: mean over the samples of their mean entropy, in nats per token.
        correctness: share of right samples.
        tokens: mean length of a sample.
    """

    entropy: np.ndarray
    correctness: np.ndarray
    tokens: np.ndarray

    def levels(self, difficulty: Sequence[int] | np.ndarray) -> dict[int, Level]:
        """The means of each level of difficulty, the lowest first; `difficulty` has one for each question."""
        given = np.asarray(difficulty)
        if given.shape != self.entropy.shape:
            raise InputError(f"{given.size} difficulties for {self.entropy.size} questions; give one for each")
        return {int(level): self._level(given == level) for level in np.unique(given)}

    def _level(self, chosen: np.ndarray) -> Level:
        entropy = self.entropy[chosen]
        picks = np.random.default_rng(0).integers(0, len(entropy), (2000, len(entropy)))
        low, high = np.percentile(entropy[picks].mean(1), [2.5, 97.5])
        means = (float(values[chosen].mean()) for values in (self.correctness, self.tokens))
        return Level(len(entropy), float(entropy.mean()), float(low), float(high), *means)

    def reading(self, difficulty: Sequence[int] | np.ndarray) -> Reading:
        """Entropy, correctness and length by level of difficulty."""
        rows = [{"level": level, **found._asdict()} for level, found in self.levels(difficulty).items()]
        return Reading("entropy of the model's own samples, by difficulty", rows)

    def plot(self, difficulty: Sequence[int] | np.ndarray) -> Table:
        """The levels with bars of entropy, for a terminal or notebook: `rich.print(profile.plot(difficulty))`."""
        levels = self.levels(difficulty)
        longest = max(found.entropy for found in levels.values()) or 1.0
        table = Table(title="entropy by difficulty", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for heading in ("level", "correct", "tokens", "nats per token"):
            table.add_column(heading, justify="right")
        table.add_column("")
        for level, found in levels.items():
            shown = f"{found.correctness:.2f}", f"{found.tokens:.1f}", f"{found.entropy:.3f}"
            table.add_row(str(level), *shown, "█" * round(BAR * found.entropy / longest))
        return table


def entropy_profile(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    is_correct: Callable[[int, str], bool],
    *,
    max_new_tokens: int,
    n_samples: int = 10,
    temperature: float = 0.8,
    chat: bool = True,
    batch_size: int = 160,
    seed: int = 0,
    progress: Progress | None = None,
) -> EntropyProfile:
    """Draw samples of each prompt and measure their entropy at temperature 1 and their correctness.

    Args:
        is_correct: whether the text answers prompt number i rightly. A sample cut off at `max_new_tokens` is wrong.
        max_new_tokens: the full budget.
        batch_size: samples at a time.
        progress: called with (prompts done, all).

    Raises:
        InputError: n_samples < 2, temperature <= 0, no prompts, max_new_tokens < 1.
    """
    prompts = listed_prompts(prompts)
    for name, value, good, allowed in (
        ("n_samples", n_samples, n_samples >= 2, "a number >= 2"),
        ("temperature", temperature, temperature > 0, "a number > 0, since samples must differ"),
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "a number >= 1"),
        ("prompts", len(prompts), len(prompts) > 0, "at least one"),
    ):
        if not good:
            raise InputError(f"{name}={value} is not allowed; give {allowed}")
    at_a_time, rows = max(1, batch_size // n_samples), []
    for start in range(0, len(prompts), at_a_time):
        batch = [prompt_ids(tokenizer, prompt, chat=chat) for prompt in prompts[start : start + at_a_time]]
        check_prompt_fits(model, max(map(len, batch)), max_new_tokens)
        drawn = _draw(model, tokenizer, batch, n_samples, temperature, max_new_tokens, seed + start)
        for i in range(len(batch)):
            own = drawn[i * n_samples : (i + 1) * n_samples]
            right = [is_correct(start + i, one.text) and one.finished for one in own]
            rows.append([np.mean(values) for values in ([s.entropy for s in own], right, [s.tokens for s in own])])
        if progress:
            progress(min(start + at_a_time, len(prompts)), len(prompts))
    return EntropyProfile(*np.array(rows).T)


class _Drawn(NamedTuple):
    """One sample: its mean entropy in nats, its length, its text, and whether it ended before the limit."""

    entropy: float
    tokens: int
    text: str
    finished: bool


@torch.no_grad()
def _draw(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    n_samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> list[_Drawn]:
    """The samples of the first prompt, of the second, and so on."""
    inputs = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt").to(model.device)
    watch = StepEntropies()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = cast(Any, model).generate(
            **inputs,
            logits_processor=LogitsProcessorList([watch]),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=n_samples,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
    new = out[:, inputs["input_ids"].shape[1] :]
    ends = _ends(new, model.generation_config.eos_token_id)
    mask = ends.cumsum(-1) - ends == 0  # up to the first end of text, and on it
    entropy = _masked_mean(torch.stack(watch.steps, 1), mask)
    texts = [cast(str, tokenizer.decode(row[keep], skip_special_tokens=True)) for row, keep in zip(new, mask)]
    return list(map(_Drawn, entropy.tolist(), mask.sum(-1).tolist(), texts, ends.bool().any(-1).tolist()))


def _ends(new: Tensor, eos: int | Sequence[int] | None) -> Tensor:
    """1 where a token of (rows, time) ends the text."""
    ends = torch.tensor([] if eos is None else [eos] if isinstance(eos, int) else list(eos), device=new.device)
    return torch.isin(new, ends.to(new.dtype)).long()
