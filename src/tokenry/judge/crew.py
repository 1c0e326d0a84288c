"""CRew: the probability a model gives the final answer of a solution is the worth of that solution.

Paper: Confidence as a Reward: Transforming LLMs into Reward Models, arXiv 2510.13501. No training and no second model:
for a model's own solutions the probabilities are in the `Trace` of their generation, others take one forward.
CRew-DPO makes preference pairs of right and wrong solutions from it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, WithJsonSchema, field_validator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from ..method import Method
from ..spans import text_offsets
from ..trace import Trace
from .answers import Marker, answer_tokens, check_marker, find_answer, normalise_answer

if TYPE_CHECKING:
    from datasets import Dataset
    from trl import DPOConfig

__all__ = [
    "CRew",
    "CRewScorer",
    "Judged",
    "Solution",
    "Vote",
    "best_of_n",
    "build_crew_pairs",
    "crew_dpo_config",
    "crew_reward",
    "lowest_correct",
    "weighted_vote",
]

Messages = list[dict[str, str]]

AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_prob": lambda logprob: logprob.exp().mean(),
    "geo_mean": lambda logprob: logprob.mean().exp(),
    "product": lambda logprob: logprob.sum().exp(),
    "min": lambda logprob: logprob.min().exp(),
}


# --- what is judged ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """A solution with what the model thought of its T tokens.

    Attributes:
        offsets: (T, 2) characters of `text` that each token stands for.
        logprob: (T,) log-probability of each token in nats, at temperature 1; nan where it is not known.
        finished: False if the text was cut off, for example by a limit on tokens.
        top2: the two highest probabilities at each of the given tokens, (n, 2); None if they are not known.
    """

    prompt: str
    text: str
    offsets: Tensor
    logprob: Tensor
    finished: bool = True
    top2: Callable[[Sequence[int]], Tensor] | None = None

    @classmethod
    def from_trace(cls, trace: Trace, finished: bool = True) -> Solution:
        """What follows the prompt of a trace, see `Trace.with_prompt`.

        Generation does not feed its last token back, so the trace lacks it: pass finished=False unless that token ended
        the text.

        Raises:
            InputError: a trace without text, or without a prompt.
        """
        if not trace.spans["prompt"]:
            raise InputError("this trace does not say where its prompt ends; use trace.with_prompt(number of tokens)")
        start = trace.spans["prompt"][0][1]
        offsets = trace.offsets[start:]
        first = int(offsets[0, 0]) if len(offsets) else len(trace.text)

        def top2(tokens: Sequence[int]) -> Tensor:
            return trace.logits([start + t - 1 for t in tokens]).softmax(-1).topk(2).values

        known = None if trace.model is None else top2
        return cls(trace.text[:first], trace.text[first:], offsets - first, trace.logprob[start:], finished, known)


class Judged(NamedTuple):
    """A solution and its worth; `answer` and `score` are None where no answer was found, `correct` without a gold."""

    prompt: str
    solution: str
    answer: str | None
    score: float | None
    correct: bool | None = None


class CRew(Method):
    """Scores a solution by the probability of the tokens of its final answer.

    scores = CRew(marker="answer").score(traces)
    """

    slug: ClassVar[str] = "crew"
    stage: ClassVar[str] = "judge"
    title: ClassVar[str] = "CRew"
    paper: ClassVar[str] = "Confidence as a Reward: Transforming LLMs into Reward Models, arXiv 2510.13501"
    claim: ClassVar[str] = "The probability a model gives its own final answer tells right from wrong solutions."

    aggregate: Literal["mean_prob", "geo_mean", "product", "min", "top2_gap"] = Field(
        "mean_prob", description="how the probabilities of the answer's tokens become one score"
    )
    marker: Annotated[Marker, WithJsonSchema({"type": "string"})] = Field(
        "boxed",
        description="where the answer is: boxed, answer (after 'A:', 'The answer is' or '####'), number (the last), "
        "or a regex with one group",
    )

    @field_validator("marker")
    @classmethod
    def _is_marker(cls, marker: Marker) -> Marker:
        return check_marker(marker)

    def score(self, samples: Iterable[Trace | Solution]) -> list[float | None]:
        """The worth of each sample in [0, 1]; None where no whole answer is found, never 0.

        Raises:
            InputError: top2_gap on a trace without its model; an answer whose probabilities are not known.
        """
        return [judged.score for judged in self.judge(samples)]

    def judge(self, samples: Iterable[Trace | Solution], gold: Sequence[str | None] | None = None) -> list[Judged]:
        """Answer and score of each sample, and whether the answer is the same as its `gold` one."""
        solutions = [Solution.from_trace(s) if isinstance(s, Trace) else s for s in samples]
        golden = [None] * len(solutions) if gold is None else gold
        return [self._judge(solution, right) for solution, right in zip(solutions, golden, strict=True)]

    def _judge(self, solution: Solution, gold: str | None) -> Judged:
        span = self.find(solution.text, solution.finished)
        tokens = [] if span is None else answer_tokens(solution.text, solution.offsets, span)
        answer = solution.text[slice(*span)] if tokens else None
        correct = None
        if gold is not None:
            correct = answer is not None and normalise_answer(answer) == normalise_answer(gold)
        return Judged(solution.prompt, solution.text, answer, self._confidence(solution, tokens), correct)

    def find(self, text: str, finished: bool = True) -> tuple[int, int] | None:
        """Where the answer stands, see `find_answer`."""
        return find_answer(text, self.marker, finished)

    def _confidence(self, solution: Solution, tokens: list[int]) -> float | None:
        if not tokens:
            return None
        if self.aggregate == "top2_gap":
            if solution.top2 is None:
                raise InputError("top2_gap needs the model's other choices; use Trace.load(path, model) or CRewScorer")
            best = solution.top2(tokens)
            return float((best[:, 0] - best[:, 1]).mean())
        logprob = solution.logprob[tokens].float()
        if logprob.isnan().any():
            raise InputError("the probability of the answer is not known; score this solution with CRewScorer")
        return float(AGGREGATES[self.aggregate](logprob))


# --- solutions given as text ---------------------------------------------------------------------------------------


class CRewScorer:
    """Scores solutions given as text by feeding them to a model, their own or another one.

    Args:
        method: how to score.
        chat: put each prompt through the model's chat template, where its tokenizer has one. A prompt that is a list
            of messages always goes through it.
        batch_size: solutions per forward.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        method: CRew | None = None,
        chat: bool = True,
        batch_size: int = 8,
    ) -> None:
        self.model, self.tokenizer, self.method = model, tokenizer, method or CRew()
        self.chat, self.batch_size = chat, batch_size

    def score_batch(
        self,
        prompts: Sequence[str | Messages],
        solutions: Sequence[str],
        finished: Sequence[bool] | None = None,
    ) -> list[float | None]:
        """The worth of each solution to its prompt, see `CRew.score` and `read`."""
        return self.method.score(self.read(prompts, solutions, finished))

    @torch.no_grad()
    def read(
        self,
        prompts: Sequence[str | Messages],
        solutions: Sequence[str],
        finished: Sequence[bool] | None = None,
    ) -> list[Solution]:
        """The solutions with the log-probabilities of their answers; those of other tokens are nan.

        Args:
            finished: which solutions ended by themselves; None for all.

        Raises:
            InputError: an empty prompt, a prompt and solution beyond the context window, or lists of unequal length.
        """
        whole = [True] * len(solutions) if finished is None else finished
        if not len(prompts) == len(solutions) == len(whole):
            raise InputError(f"{len(prompts)} prompts for {len(solutions)} solutions; give one of each, and `finished`")
        rows = [self._row(*given) for given in zip(prompts, solutions, whole)]
        answered = [row for row in rows if row.tokens]
        for first in range(0, len(answered), self.batch_size):
            self._fill(answered[first : first + self.batch_size])
        return [row.solution for row in rows]

    def _row(self, prompt: str | Messages, solution: str, finished: bool) -> _Row:
        """The tokens to feed. Prompt and solution are tokenized apart, as they are in generation."""
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise InputError("the prompt is empty; give the question that the solution answers")
        shown, start = self._prompt(prompt)
        ids = self.tokenizer(solution, add_special_tokens=False).input_ids
        window = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if window is not None and len(start) + len(ids) > window:
            raise InputError(
                f"a prompt and solution have {len(start) + len(ids)} tokens, the model's context window {window}; "
                "shorten them"
            )
        text, offsets = text_offsets(self.tokenizer, ids)
        span = self.method.find(text, finished)
        tokens = [] if span is None else answer_tokens(text, offsets, span)
        logprob, best = torch.full((len(ids),), torch.nan), torch.full((len(ids), 2), torch.nan)
        known = Solution(shown, text, offsets, logprob, finished, lambda tokens: best[list(tokens)])
        return _Row(start + ids, [len(start) + t for t in tokens], tokens, known, best)

    def _prompt(self, prompt: str | Messages) -> tuple[str, list[int]]:
        """The prompt as a text (messages in their template) and its tokens."""
        if isinstance(prompt, str) and not (self.chat and self.tokenizer.chat_template):
            return prompt, self.tokenizer(prompt).input_ids
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        shown = prompt if isinstance(prompt, str) else text
        return shown, self.tokenizer(text, add_special_tokens=False).input_ids

    def _fill(self, rows: Sequence[_Row]) -> None:
        """One forward of left-padded rows, whose answers then share columns; logits of these columns only."""
        width = max(len(row.ids) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, width - len(row.ids) :] = torch.tensor(row.ids)
            mask[i, width - len(row.ids) :] = 1
        before = [torch.tensor(row.positions) + width - len(row.ids) - 1 for row in rows]  # row t predicts token t + 1
        columns = torch.cat(before).unique()
        device = self.model.device
        logits = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
            logits_to_keep=columns.to(device),
            use_cache=False,
        ).logits
        for row, mine, own in zip(rows, before, logits):
            logprobs = own[torch.searchsorted(columns, mine).to(device)].float().log_softmax(-1).cpu()
            target = torch.tensor([row.ids[p] for p in row.positions])
            row.solution.logprob[row.tokens] = logprobs.gather(1, target[:, None]).squeeze(1)
            row.best[row.tokens] = logprobs.topk(2).values.exp()


class _Row(NamedTuple):
    """What to feed, where the answer stands in it (`positions`) and in the solution (`tokens`), and what to fill."""

    ids: list[int]
    positions: list[int]
    tokens: list[int]
    solution: Solution
    best: Tensor


# --- what scores are for -------------------------------------------------------------------------------------------


class Vote(NamedTuple):
    """The answer that won, normalised, and its share of all weight."""

    answer: str
    share: float


def best_of_n(samples: Sequence[Judged]) -> Judged | None:
    """The sample of the highest score, the first of equals; None if no sample has an answer.

    Raises:
        InputError: fewer than 2 samples, or samples of several prompts.
    """
    _check_choice(samples)
    return max((s for s in samples if s.score is not None), key=lambda s: s.score, default=None)


def weighted_vote(samples: Sequence[Judged]) -> Vote | None:
    """The answer with the largest sum of scores, the first seen of equals; None if no sample has an answer.

    With equal scores this is self-consistency.

    Raises:
        InputError: as `best_of_n`.
    """
    _check_choice(samples)
    weights: dict[str, float] = {}
    for sample in samples:
        if sample.score is not None:
            answer = normalise_answer(sample.answer)
            weights[answer] = weights.get(answer, 0.0) + sample.score
    if not weights:
        return None
    winner, total = max(weights, key=weights.get), sum(weights.values())
    return Vote(winner, weights[winner] / total if total else 1 / len(weights))


def _check_choice(samples: Sequence[Judged]) -> None:
    prompts = {sample.prompt for sample in samples}
    if len(samples) < 2:
        raise InputError(f"there is nothing to choose among {len(samples)} samples; give at least 2 of one prompt")
    if len(prompts) > 1:
        raise InputError(f"these samples answer {len(prompts)} prompts; choose among the samples of one prompt")


def lowest_correct(samples: Iterable[Judged]) -> list[Judged]:
    """For fine-tuning: the right solution of the lowest score for each prompt, which the paper finds to teach most."""
    groups = _by_prompt(samples).values()
    right = [[s for s in group if s.correct and s.score is not None] for group in groups]
    return [min(group, key=lambda s: s.score) for group in right if group]


def build_crew_pairs(samples: Iterable[Judged], top_k: int = 10, min_gap: float | None = None) -> Dataset:
    """Preference pairs of CRew-DPO: for each prompt the (right, wrong) pairs with the largest difference of scores.

    Args:
        samples: judged solutions of any number of prompts; the paper draws 30 a prompt at temperature 1. Those without
            an answer are left out.
        top_k: pairs per prompt; the paper takes 10 (MATH) or 15 (GSM8K).
        min_gap: smallest difference; 0 drops pairs whose wrong answer is the surer one, None keeps them.

    Returns:
        Columns prompt, chosen, rejected, gap, as `trl.DPOTrainer` takes them. Its `info.description` says how many
        prompts gave no pair.

    Raises:
        InputError: top_k < 1, samples that were judged without a gold answer, no pair at all, or no `datasets`.
    """
    if top_k < 1:
        raise InputError(f"top_k={top_k} keeps no pair; give a number >= 1")
    datasets = _train_package("datasets")
    groups = _by_prompt(samples)
    found = [_pairs(group, top_k, min_gap) for group in groups.values()]
    rows = [row for group in found for row in group]
    if not rows:
        raise InputError(
            f"none of the {len(groups)} prompts has a right and a wrong solution to compare; draw more samples"
            + ("" if min_gap is None else f", or lower min_gap={min_gap}")
        )
    dataset = datasets.Dataset.from_list(rows)
    empty = sum(not group for group in found)
    dataset.info.description = f"{empty} of {len(groups)} prompts gave no pair ({empty / len(groups):.0%})"
    return dataset


def _by_prompt(samples: Iterable[Judged]) -> dict[str, list[Judged]]:
    groups: dict[str, list[Judged]] = {}
    for sample in samples:
        if sample.correct is None:
            raise InputError("a sample is neither right nor wrong; give its gold answer: judge(..., gold=[...])")
        groups.setdefault(sample.prompt, []).append(sample)
    return groups


def _pairs(samples: Sequence[Judged], top_k: int, min_gap: float | None) -> list[dict[str, Any]]:
    """The pairs of one prompt, largest gap first."""
    known = [s for s in samples if s.score is not None]
    pairs = [
        {"prompt": good.prompt, "chosen": good.solution, "rejected": bad.solution, "gap": good.score - bad.score}
        for good in known
        for bad in known
        if good.correct and not bad.correct
    ]
    kept = [pair for pair in pairs if min_gap is None or pair["gap"] >= min_gap]
    return sorted(kept, key=lambda pair: -pair["gap"])[:top_k]


def crew_dpo_config(
    output_dir: str, development: bool = True, per_device_train_batch_size: int = 8, **options: Any
) -> DPOConfig:
    """The paper's training: beta 0.3, learning rate 5e-7, 128 pairs a step on one device, 2 epochs.

    Args:
        development: evaluate every 50 steps and keep the best; the trainer then needs an `eval_dataset`. In the paper
            the second round lost accuracy, so this is worth its price.
        options: anything `DPOConfig` takes; replaces the values above.

    Raises:
        InputError: a batch size that does not divide 128, or no `trl`.
    """
    if per_device_train_batch_size < 1 or 128 % per_device_train_batch_size:
        raise InputError(f"per_device_train_batch_size={per_device_train_batch_size} does not divide 128; give 8 or 16")
    checks = {"eval_strategy": "steps", "eval_steps": 50, "load_best_model_at_end": True} if development else {}
    paper = {
        "beta": 0.3,
        "learning_rate": 5e-7,
        "num_train_epochs": 2,
        "per_device_train_batch_size": per_device_train_batch_size,
        "gradient_accumulation_steps": 128 // per_device_train_batch_size,
        "save_steps": 50,
    }
    return _train_package("trl").DPOConfig(output_dir, **{**paper, **checks, **options})


def crew_reward(scorer: CRewScorer) -> Callable[..., list[float | None]]:
    """A reward function for `trl.GRPOTrainer`, for prompts and completions as text or as messages.

    A completion without an answer gets None, which the trainer leaves out. Text prompts go through the chat template
    unless the scorer has chat=False. Use the marker "boxed": trl does not say which completions were cut off, and
    only a closed brace proves that an answer is whole.
    """

    def crew_reward(prompts: Sequence, completions: Sequence, **kwargs: Any) -> list[float | None]:
        texts = [c if isinstance(c, str) else "".join(turn["content"] for turn in c) for c in completions]
        return scorer.score_batch(prompts, texts)

    return crew_reward


def _train_package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(f"CRew-DPO needs the package {name}; run `pip install tokenry[train]`") from None
