"""Counterfactual importance: what becomes of the answer, and of later sentences, when a sentence is written anew.

importance = CounterfactualImportance(generate_fn, embed_fn, answer_fn, n=100)
rollouts = importance.sample(trace)
importance.score(rollouts, correct="12"); attribution_matrix(rollouts)
importance.forced(trace, tokenizer, correct="12")
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log, nan
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.errors import InputError
from ...models.batch import pad_id, right_padded
from ...models.kv_cache import new_cache
from ...text.answers import normalise_answer
from ...text.sentences import split_sentences, thought
from ...trace.trace import Trace
from .sentences import sentences_of

__all__ = [
    "CounterfactualImportance",
    "Importance",
    "Rollout",
    "Rollouts",
    "attribution_matrix",
    "first_token",
    "generate_rollouts",
    "mean_states",
]

FLOOR = 1e-9  # added to counts
FORCED = " Therefore, the final answer is"
ROWS = 32  # texts embedded at a time
GenerateFn = Callable[[list[int], int], Sequence[str]]  # (ids of the prefix, how many) -> continuations
EmbedFn = Callable[[Sequence[str]], Tensor]  # texts -> (texts, width)
AnswerFn = Callable[[str], str | None]  # prefix and continuation -> answer


class Rollout(NamedTuple):
    """The sentences of a continuation, and the answer that it comes to."""

    sentences: list[str]
    answer: str


@dataclass(frozen=True)
class Rollouts:
    """Continuations from before each sentence of a text; those without an answer are left out.

    Attributes:
        sentences: those of the text.
        before: for each sentence the rollouts in which it was written anew.
        embed: unit vectors (texts, width) of texts.
    """

    sentences: list[str]
    before: list[list[Rollout]]
    embed: EmbedFn

    def __post_init__(self) -> None:
        if len(self.before) != len(self.sentences):
            raise InputError(
                f"there are rollouts for {len(self.before)} of {len(self.sentences)} sentences; give a list for each"
            )

    def cosines(self, rollouts: Sequence[Rollout], sentence: str, first_only: bool = False) -> list[float]:
        """For each rollout the highest cosine of any of its sentences, or of its first, with one sentence."""
        texts = [r.sentences[:1] if first_only else r.sentences for r in rollouts]
        unique = list(dict.fromkeys([sentence, *(text for of in texts for text in of)]))
        vectors = torch.nn.functional.normalize(self.embed(unique).float(), dim=-1)
        near = dict(zip(unique, (vectors @ vectors[0]).tolist(), strict=True))
        return [max((near[text] for text in of), default=-1.0) for of in texts]


class Importance(NamedTuple):
    """How much one sentence matters; accuracies are NaN where no right answer is known.

    Attributes:
        resampling_accuracy: accuracy with the sentence kept minus that with it written anew.
        counterfactual_accuracy: accuracy where something else was written minus that with the sentence kept.
        counterfactual_kl: divergence in nats of the answers where something else was written from the others.
        correct_kl: the same of right and wrong alone.
        different_fraction: share of rollouts that write something else.
        overdeterminedness: 1 minus the share of different texts among what they write.
    """

    resampling_accuracy: float
    counterfactual_accuracy: float
    counterfactual_kl: float
    correct_kl: float
    different_fraction: float
    overdeterminedness: float


@dataclass(frozen=True)
class CounterfactualImportance:
    """How the answers move when a sentence is written anew, `n` times for each.

    Attributes:
        generate_fn: gives so many continuations of token ids, see `generate_rollouts`.
        embed_fn: embeds sentences, for example with a sentence-transformers model or `mean_states`.
        answer_fn: the answer in a text, or None.
        threshold: cosine below which the new sentence says something else.
    """

    generate_fn: GenerateFn
    embed_fn: EmbedFn
    answer_fn: AnswerFn
    n: int = 100
    threshold: float = 0.8

    def __post_init__(self) -> None:
        if self.n < 2:
            raise InputError(f"n={self.n} is not allowed; give at least 2 rollouts")
        if not -1 <= self.threshold <= 1:
            raise InputError(f"threshold={self.threshold} is not allowed; a cosine lies in [-1, 1]")

    def sample(self, trace: Trace) -> Rollouts:
        """Continue the text from before each of its sentences.

        Raises:
            InputError: it has no sentences, or no rollout comes to an answer.
        """
        sentences = sentences_of(trace)
        if not sentences:
            raise InputError("the trace has no sentences; capture one with some text after its prompt")
        ids, before = trace.ids.tolist(), []
        for sentence in sentences:
            texts = self.generate_fn(ids[: sentence.start], self.n)
            before.append([found for text in texts if (found := self._rollout(trace.text[: sentence.first], text))])
        if not any(before):
            raise InputError("no rollout comes to an answer; give longer rollouts, or an answer_fn that finds it")
        return Rollouts([s.text for s in sentences], before, self.embed_fn)

    def forced(
        self, trace: Trace, tokenizer: PreTrainedTokenizerBase, correct: str, ending: str = FORCED
    ) -> list[float]:
        """What each sentence adds to the accuracy of answers that are forced right after it, 0 where none come.

        Args:
            correct: the right answer.
            ending: words after which the model answers; `answer_fn` is given them with what comes before and after.

        Raises:
            InputError: the trace has no sentences.
        """
        sentences = sentences_of(trace)
        if not sentences:
            raise InputError("the trace has no sentences; capture one with some text after its prompt")
        ids, right, words = trace.ids.tolist(), normalise_answer(correct), _bare(tokenizer, ending)
        answered = []
        for token, letter in [*((s.start, s.first) for s in sentences), (sentences[-1].stop, sentences[-1].last)]:
            texts = self.generate_fn([*ids[:token], *words], self.n)
            begun = trace.text[:letter] + ending
            answered.append([found for text in texts if (found := self._rollout(begun, text))])
        return [_accuracy_gap(after, before, right) for before, after in pairwise(answered)]

    def _rollout(self, prefix: str, text: str) -> Rollout | None:
        answer = self.answer_fn(prefix + text)
        if answer is None:
            return None
        inside = text[slice(*thought(text))]
        return Rollout([inside[a:b] for a, b in split_sentences(inside)], normalise_answer(answer))

    def score(self, rollouts: Rollouts, correct: str | None = None) -> list[Importance]:
        """The importance of every sentence.

        Args:
            correct: the right answer, for the accuracies.
        """
        right = None if correct is None else normalise_answer(correct)
        return [self._importance(rollouts, i, right) for i in range(len(rollouts.sentences))]

    def _importance(self, rollouts: Rollouts, i: int, right: str | None) -> Importance:
        here = rollouts.before[i]
        after = rollouts.before[i + 1] if i + 1 < len(rollouts.before) else []
        near = rollouts.cosines(here, rollouts.sentences[i], first_only=True) if here else []
        other = [r for r, cosine in zip(here, near) if cosine < self.threshold]
        same = [r for r, cosine in zip(here, near) if cosine >= self.threshold]
        written = {r.sentences[0] if r.sentences else "" for r in here}
        return Importance(
            _accuracy_gap(after, here, right),
            _accuracy_gap(other, after, right),
            _divergence(_answers(other), _answers(after + same)) if other and after else 0.0,
            _right_divergence(other, after + same, right) if other and after else 0.0,
            len(other) / len(here) if here else 0.0,
            1 - len(written) / len(here) if here else 0.0,
        )


def _answers(rollouts: Sequence[Rollout]) -> Counter[str]:
    return Counter(rollout.answer for rollout in rollouts)


def _accuracy_gap(first: Sequence[Rollout], second: Sequence[Rollout], right: str | None) -> float:
    """Accuracy of the first minus that of the second; 0 if either is empty."""
    if right is None:
        return nan
    if not first or not second:
        return 0.0
    a, b = (sum(r.answer == right for r in rollouts) / len(rollouts) for rollouts in (first, second))
    return a - b


def _divergence(p: Counter[str], q: Counter[str]) -> float:
    """KL in nats of answers, with 1e-9 added to each count."""
    answers = p.keys() | q.keys()
    total_p, total_q = (counts.total() + FLOOR * len(answers) for counts in (p, q))
    shares = (((p[a] + FLOOR) / total_p, (q[a] + FLOOR) / total_q) for a in answers)
    return max(0.0, sum(x * log(x / y) for x, y in shares))


def _right_divergence(first: Sequence[Rollout], second: Sequence[Rollout], right: str | None) -> float:
    if right is None:
        return nan
    first_right, second_right = (Counter({"right": 0, "wrong": 0}) for _ in range(2))
    first_right.update("right" if r.answer == right else "wrong" for r in first)
    second_right.update("right" if r.answer == right else "wrong" for r in second)
    return _divergence(first_right, second_right)


def attribution_matrix(rollouts: Rollouts, threshold: float = 0.7) -> Tensor:
    """How much sentence i makes sentence j come up, (n, n) as [j, i], NaN unless i < j.

    The share of rollouts that keep i in which some sentence is like j, minus that share among those that write i anew;
    NaN too where there are none.
    """
    n = len(rollouts.sentences)
    shares = torch.full((n, n), torch.nan)  # [j, i]: of the rollouts from before i
    for j, sentence in enumerate(rollouts.sentences):
        for i in range(j + 1):
            if rollouts.before[i]:
                near = torch.tensor(rollouts.cosines(rollouts.before[i], sentence))
                shares[j, i] = (near >= threshold).float().mean()
    matrix = torch.full((n, n), torch.nan)
    matrix[:, :-1] = shares[:, 1:] - shares[:, :-1]
    return torch.where(torch.ones(n, n).tril(-1).bool(), matrix, torch.nan)


# --- with the model itself -----------------------------------------------------------------------------------------


def generate_rollouts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int = 512,
    temperature: float = 0.6,
    top_p: float = 0.95,
    seed: int = 0,
) -> GenerateFn:
    """Continuations by `model.generate`: one batch, whose prefix is computed once; each call draws from the seed."""

    def generate(prefix: list[int], count: int) -> list[str]:
        prefix = prefix or [first_token(tokenizer)]
        ids = torch.tensor([prefix], device=model.device)
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            out = cast(Any, model).generate(
                input_ids=ids.expand(count, -1),
                attention_mask=torch.ones_like(ids).expand(count, -1),
                past_key_values=_shared(model, ids, count),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_id(tokenizer),
                **sampling,
            )
        return tokenizer.batch_decode(out[:, len(prefix) :], skip_special_tokens=True)

    return generate


def _bare(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that goes on another one."""
    return cast(list[int], tokenizer(text, add_special_tokens=False).input_ids)


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before a text that begins with its first sentence."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return cast(int, token)
    raise InputError("the first sentence has nothing before it; give a text with a prompt")


def _shared(model: PreTrainedModel, ids: Tensor, count: int) -> Any:
    """A cache of all but the last token, `count` times; None where there is nothing to share."""
    cache = new_cache(model)
    if cache is None or ids.shape[1] < 2:
        return None
    model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache = copy.copy(cache)
    cache.batch_repeat_interleave(count)
    return cache


def mean_states(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> EmbedFn:
    """Sentences as the mean of the model's own states in its middle layer."""

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        found = []
        for first in range(0, len(texts), ROWS):
            rows = [tokenizer(text).input_ids or [pad_id(tokenizer)] for text in texts[first : first + ROWS]]
            ids, mask = (t.to(model.device) for t in right_padded(rows, pad_id(tokenizer)))
            states = model(
                input_ids=ids, attention_mask=mask.long(), use_cache=False, output_hidden_states=True, logits_to_keep=1
            ).hidden_states
            middle = states[len(states) // 2].float()
            found.append((middle * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return torch.cat(found).cpu()

    return embed
