"""TVM: a value model puts a number on every token of a solution, the probability that it ends right.

Paper: Token-Supervised Value Models for Enhancing Mathematical Problem-Solving Capabilities of Large Language Models,
arXiv 2407.12863, ICLR 2025. A whole solution is worth what its last token is: the best of n, a vote weighted by values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from ..core.errors import InputError
from ..core.progress import Progress
from ..learned.token_values import TokenValueField, TokenValueModel
from ..models.batch import right_padded
from ..models.load import Loaded
from ..models.positions import context_window
from ..models.prompts import listed_prompts, prompt_ids, rendered
from ..text.answers import Marker, find_answer, normalise_answer
from ..text.token_text import check_encodable
from ..text.words import listed
from ..trace.trace import Trace
from .answers.marker import MarkerField
from .answers.samples import Judged, Messages, Sample, Solution
from .answers.scores import Scores
from .contract import Scorer, ScorerMethod

__all__ = ["TVM", "TVMScorer", "TokenValues"]


class TVM(ScorerMethod):
    """Scores a solution by the value that a trained model gives its last token.

    scores = TVM(values="values", marker="answer").scorer(load("zoo/reasoner")).score(samples)
    """

    slug: ClassVar[str] = "tvm"
    title: ClassVar[str] = "TVM"
    paper: ClassVar[str] = (
        "Token-Supervised Value Models for Enhancing Mathematical Problem-Solving Capabilities of Large Language "
        "Models, ICLR 2025, arXiv 2407.12863"
    )
    claim: ClassVar[str] = (
        "Labels counted over shared prefixes teach the worth of unfinished solutions better than the outcome as the "
        "label of every token."
    )

    values: TokenValueField = Field(
        description="folder of a token value model, or in Python the model itself; `tokenry train --method tvm` makes "
        "one"
    )
    marker: MarkerField = "boxed"

    def scorer(self, loaded: Loaded, chat: bool = True) -> TVMScorer:
        """Scores solutions of this model; only its tokenizer is used, to make tokens of texts."""
        model, tokenizer = loaded
        self.values.check(tokenizer)
        self.values.to(model.device)  # pyright: ignore[reportArgumentType]  # wrapped, it does not look like a method
        return TVMScorer(self.values.eval(), tokenizer, self.marker, chat)


class TokenValues(NamedTuple):
    """A solution in tokens, the end-of-text token among them, and the value after each."""

    ids: list[int]
    values: list[float]


class TVMScorer(Scorer):
    """Scores solutions with a token value model.

    Args:
        marker: where the answer is, see `TVM`.
        chat: put each prompt through the chat template, where the tokenizer has one. A prompt that is a list of
            messages always goes through it.
        batch_size: solutions per forward.
    """

    def __init__(
        self,
        values: TokenValueModel,
        tokenizer: PreTrainedTokenizerBase,
        marker: Marker = "boxed",
        chat: bool = True,
        batch_size: int = 8,
    ) -> None:
        values.check(tokenizer)
        self.values, self.tokenizer, self.marker = values, tokenizer, marker
        self.chat, self.batch_size = chat, batch_size

    def score(self, samples: Sequence[Sample | Trace], progress: Progress | None = None) -> Scores:
        """See `Scorer.score`. A solution without an answer has no score."""
        judged: list[Judged] = []
        for first in range(0, len(samples), self.batch_size):
            part = samples[first : first + self.batch_size]
            read = self._read([self._sample_row(sample) for sample in part])
            judged += [self._judged(sample, found.values[-1]) for sample, found in zip(part, read)]
            if progress:
                progress(len(judged), len(samples))
        return Scores(judged)

    def _judged(self, sample: Sample | Trace, value: float) -> Judged:
        if isinstance(sample, Trace):
            solution = Solution.from_trace(sample)
            prompt, text, gold = solution.prompt, solution.text, None
        else:
            prompt, text, gold = sample.prompt, sample.solution, sample.answer
        if not isinstance(prompt, str):
            prompt = rendered(self.tokenizer, prompt, add_generation_prompt=True)
        span = find_answer(text, self.marker)
        answer = None if span is None else text[slice(*span)]
        correct = None
        if gold is not None:
            correct = answer is not None and normalise_answer(answer) == normalise_answer(gold)
        return Judged(prompt, text, answer, None if answer is None else value, correct)

    def token_values(self, prompts: Sequence[str | Messages], solutions: Sequence[str]) -> list[TokenValues]:
        """The value after every token of each solution to its prompt; finished solutions, whose end counts as a token.

        Raises:
            InputError: an empty prompt, a prompt and solution beyond the context window, or lists of unequal length.
        """
        prompts, solutions = listed_prompts(prompts), listed(solutions, "solution")
        if len(prompts) != len(solutions):
            raise InputError(f"{len(prompts)} prompts for {len(solutions)} solutions; give one of each")
        rows = [self._row(*given) for given in zip(prompts, solutions)]
        parts = [rows[first : first + self.batch_size] for first in range(0, len(rows), self.batch_size)]
        return [found for part in parts for found in self._read(part)]

    def _read(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[TokenValues]:
        """The values of a batch of prompts and solutions in tokens."""
        window = context_window(self.values)
        for start, own in rows:
            if window is not None and len(start) + len(own) > window:
                raise InputError(
                    f"a prompt and solution have {len(start) + len(own)} tokens, the value model's context window "
                    f"{window}; shorten them"
                )
        ids, mask = right_padded([[*start, *own] for start, own in rows])
        device = self.values.device
        values = self.values.score(ids.to(device), mask.long().to(device)).tolist()
        return [TokenValues(own, line[len(start) : len(start) + len(own)]) for (start, own), line in zip(rows, values)]

    def _sample_row(self, sample: Sample | Trace) -> tuple[list[int], list[int]]:
        """Prompt and solution in tokens; those of a trace are there already."""
        if isinstance(sample, Sample):
            return self._row(sample.prompt, sample.solution)
        Solution.from_trace(sample)  # refuses a trace without text or prompt
        ids, start = sample.ids.tolist(), sample.spans["prompt"][0][1]
        return ids[:start], self._ended(ids[start:])

    def _row(self, prompt: str | Messages, solution: str) -> tuple[list[int], list[int]]:
        """The tokens of prompt and solution, which are made apart, as in generation."""
        check_encodable(solution, "a solution")
        start = prompt_ids(self.tokenizer, prompt, chat=self.chat or not isinstance(prompt, str))
        return start, self._ended(self.tokenizer(solution, add_special_tokens=False).input_ids)

    def _ended(self, ids: list[int]) -> list[int]:
        """A solution with its end, where the tokenizer has one."""
        end = self.tokenizer.eos_token_id
        ended = ids if end is None or ids[-1:] == [end] else [*ids, end]
        if not ended:
            raise InputError("a solution has no tokens, and so no last one to value; leave it out")
        return ended
