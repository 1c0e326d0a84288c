"""CRew: the probability a model gives the final answer of a solution is the worth of that solution.

Paper: Confidence as a Reward: Transforming LLMs into Reward Models, arXiv 2510.13501. No training and no second model:
for a model's own solutions the probabilities are in the `Trace` of their generation, others take one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.claim import Claim
from ..core.errors import InputError
from ..core.progress import Progress
from ..models.batch import left_padded, position_ids
from ..models.load import Loaded
from ..models.positions import context_window
from ..models.prompts import listed_prompts, rendered
from ..text.answers import answer_tokens, find_answer, normalise_answer
from ..text.spans import text_offsets
from ..text.token_text import check_encodable
from ..text.words import listed
from ..trace.trace import Trace
from .answers.marker import MarkerField
from .answers.samples import Judged, Messages, Sample, Solution
from .answers.scores import Scores
from .contract import Scorer, ScorerMethod

__all__ = ["CRew", "CRewScorer", "crew_reward"]

Aggregate = Literal["mean_prob", "geo_mean", "product", "min", "top2_gap"]


class CRew(ScorerMethod):
    """Scores a solution by the probability of the tokens of its final answer.

    scores = CRew(marker="answer").score(traces)
    """

    slug: ClassVar[str] = "crew"
    title: ClassVar[str] = "CRew"
    paper: ClassVar[str] = "Confidence as a Reward: Transforming LLMs into Reward Models, arXiv 2510.13501"
    claim: ClassVar[str] = "The probability a model gives its own final answer tells right from wrong solutions."
    published: ClassVar[Claim] = Claim(
        "27.12", "% right, 1 of 10 (perplexity 2.07, random 10.00)", "Qwen2.5-7B-Instruct, RewardMATH"
    )

    aggregate: Aggregate = Field(
        default="mean_prob", description="how the probabilities of the answer's tokens become one score"
    )
    marker: MarkerField = "boxed"

    def scorer(self, loaded: Loaded, chat: bool = True) -> CRewScorer:
        """Scores solutions given as text, too, by feeding them to a model."""
        return CRewScorer(*loaded, self, chat)

    def score(self, samples: Iterable[Trace | Solution]) -> list[float | None]:
        """The worth of each sample in [0, 1]; None where no whole answer is found, never 0.

        Raises:
            InputError: top2_gap on a trace without its model; an answer whose probabilities are not known.
        """
        return [judged.score for judged in self.judge(samples)]

    def judge(self, samples: Iterable[Trace | Solution], gold: Sequence[str | None] | None = None) -> list[Judged]:
        """Answer and score of each sample, and whether the answer is the same as its `gold` one."""
        solutions = [Solution.from_trace(s) if isinstance(s, Trace) else s for s in samples]
        golden = [None] * len(solutions) if gold is None else [gold] if isinstance(gold, str) else gold
        return [self._judge(solution, right) for solution, right in zip(solutions, golden, strict=True)]

    def _judge(self, solution: Solution, gold: str | None) -> Judged:
        span = self.find(solution.text, solution.finished)
        tokens = [] if span is None else answer_tokens(solution.text, solution.offsets, span)
        answer = solution.text[slice(*span)] if span is not None and tokens else None
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


AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean_prob": lambda logprob: logprob.exp().mean(),
    "geo_mean": lambda logprob: logprob.mean().exp(),
    "product": lambda logprob: logprob.sum().exp(),
    "min": lambda logprob: logprob.min().exp(),
}


class CRewScorer(Scorer):
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

    def score(self, samples: Sequence[Sample | Trace], progress: Progress | None = None) -> Scores:
        """See `Scorer.score`."""
        read: list[Solution] = []
        for first in range(0, len(samples), self.batch_size):
            read += self._solutions(samples[first : first + self.batch_size])
            if progress:
                progress(len(read), len(samples))
        return Scores(self.method.judge(read, [s.answer if isinstance(s, Sample) else None for s in samples]))

    def _solutions(self, samples: Sequence[Sample | Trace]) -> list[Solution]:
        """Those given as text are fed to the model, all in one batch."""
        texts = [sample for sample in samples if isinstance(sample, Sample)]
        fed = iter(self.read([s.prompt for s in texts], [s.solution for s in texts]) if texts else ())
        return [next(fed) if isinstance(sample, Sample) else Solution.from_trace(sample) for sample in samples]

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
        for name, given in (("prompts", prompts), ("solutions", solutions)):
            if isinstance(given, Mapping):
                raise InputError(f"{name} are of type {type(given).__name__}; give a list with one for each solution")
        prompts, solutions = listed_prompts(prompts), listed(solutions, "solution")
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
        for text in (solution, *([prompt] if isinstance(prompt, str) else [])):
            check_encodable(text, "a prompt or solution")
        shown, start = self._prompt(prompt)
        ids = self.tokenizer(solution, add_special_tokens=False).input_ids
        window = context_window(self.model)
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
        text = rendered(self.tokenizer, turns, add_generation_prompt=True)
        shown = prompt if isinstance(prompt, str) else text
        return shown, self.tokenizer(text, add_special_tokens=False).input_ids

    def _fill(self, rows: Sequence[_Row]) -> None:
        """One forward of left-padded rows, whose answers then share columns; logits of these columns only."""
        ids, mask = left_padded([row.ids for row in rows])
        width = ids.shape[1]
        before = [torch.tensor(row.positions) + width - len(row.ids) - 1 for row in rows]  # row t predicts token t + 1
        columns = torch.cat(before).unique()
        device = self.model.device
        logits = self.model(
            input_ids=ids.to(device),
            attention_mask=mask.long().to(device),
            position_ids=position_ids(mask).to(device),
            logits_to_keep=columns.to(device),
            use_cache=False,
        ).logits
        for row, mine, own in zip(rows, before, logits):
            logprobs = own[torch.searchsorted(columns, mine).to(device)].float().log_softmax(-1).cpu()
            target = torch.tensor([row.ids[p] for p in row.positions])
            row.solution.logprob[row.tokens] = logprobs.gather(1, target[:, None]).squeeze(1)
            row.best[row.tokens] = logprobs.topk(2).values.exp()


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


class _Row(NamedTuple):
    """What to feed, where the answer stands in it (`positions`) and in the solution (`tokens`), and what to fill."""

    ids: list[int]
    positions: list[int]
    tokens: list[int]
    solution: Solution
    best: Tensor
