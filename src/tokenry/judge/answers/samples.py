"""What is judged: solutions as text, solutions with what a model thought of their tokens, and solutions with scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...core.errors import InputError
from ...trace.trace import Trace

__all__ = ["Judged", "Messages", "Sample", "Solution"]

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Sample:
    """A solution to a prompt, as text; `answer` is the right one, where it is known."""

    prompt: str | Messages
    solution: str
    answer: str | None = None


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
