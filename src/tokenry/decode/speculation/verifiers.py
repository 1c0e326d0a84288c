"""Verifiers of multi-draft speculative decoding: which token comes out at one position, given the drafted ones.

Papers: Fast Inference from Transformers via Speculative Decoding, arXiv 2211.17192 (one draft); SpecTr: Fast
Speculative Decoding via Optimal Transport, arXiv 2310.15141 (K-SEQ); Towards Optimal Multi-draft Speculative Decoding,
arXiv 2502.18779 (recursive rejection, the greedy draft).

Every verifier tests drafted tokens one after another and, where all fail, draws from a residual. `steps` is that plan,
`select` follows it with random numbers, and `output_distribution` with exact probabilities. Each verifier is lossless
for one way of drafting, its `sampling`: over drafts drawn so, what comes out has exactly the target distribution.

* "with": independent draws from the draft distribution; a token may come twice.
* "without": successive draws, each from what is left, renormalized.
* "greedy": the most probable tokens, and as the last one a draw from the rest, renormalized.

In formulas p is the target and q the draft distribution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ...core.errors import InputError

__all__ = [
    "SAMPLINGS",
    "VERIFIERS",
    "GreedyDraftVerifier",
    "KSeqVerifier",
    "NaiveVerifier",
    "RecursiveRejectionVerifier",
    "Selection",
    "SingleDraftVerifier",
    "Verifier",
    "check_rows",
    "kseq_acceptance_probability",
    "output_distribution",
    "sample_drafts",
]

Sampling = Literal["with", "without", "greedy"]
SAMPLINGS: tuple[Sampling, ...] = ("with", "without", "greedy")
ROW_ERROR = 1e-4  # how far from 1 the sum of a row of probabilities may be
GAMMA_ERROR = 1e-9  # how far a division factor may be out of its range
ITERATIONS = 100  # of Newton's method, which needs about six


class Selection(NamedTuple):
    """What comes out at one position.

    Attributes:
        token: the token.
        accepted: whether it is a draft that passed its test. A residual draw may land on a drafted token as well;
            whether the drafts go on from there is a question of membership, not of this flag.
    """

    token: int
    accepted: bool


class Verifier(Protocol):
    """Selects the token at one position such that the target distribution is kept exactly."""

    sampling: Sampling

    def select(
        self, target: Tensor, draft: Tensor, tokens: Sequence[int], generator: torch.Generator | None
    ) -> Selection:
        """The token after a prefix.

        Args:
            target, draft: probabilities (vocabulary,) after the prefix, float32 or float64.
            tokens: the drafted tokens in the order in which they were drawn, by this verifier's `sampling`.
        """


class Trial(NamedTuple):
    """A drafted token and its chance of acceptance, given that all tests before have failed."""

    token: int
    chance: float


class _Verifier(ABC):
    sampling: Sampling

    @abstractmethod
    def steps(self, target: Tensor, draft: Tensor, tokens: Sequence[int]) -> Iterator[Trial | Tensor]:
        """The tests in order, then the residual distribution (vocabulary,). Rows are float64 and sum to 1."""

    def select(
        self, target: Tensor, draft: Tensor, tokens: Sequence[int], generator: torch.Generator | None = None
    ) -> Selection:
        target, draft = check_rows(target, draft)
        _check_tokens(draft, tokens)
        device = generator.device if generator is not None else target.device
        numbers = torch.rand(len(tokens) + 1, generator=generator, device=device, dtype=torch.float64).tolist()
        for step, number in zip(self.steps(target, draft, tokens), numbers):
            if isinstance(step, Tensor):
                return Selection(_draw(step, number), False)
            if number < step.chance:  # strictly, so that a chance of 0 never passes
                return Selection(step.token, True)
        raise AssertionError("a verifier ended without a residual")


def output_distribution(
    verifier: _Verifier, target: Tensor, draft: Tensor, tokens: Sequence[int]
) -> tuple[Tensor, float]:
    """The exact distribution of `verifier.select(target, draft, tokens)`: probabilities (vocabulary,) of the token, and
    the probability of `accepted`."""
    target, draft = check_rows(target, draft)
    _check_tokens(draft, tokens)
    distribution, left = torch.zeros_like(target), 1.0
    for step in verifier.steps(target, draft, tokens):
        if isinstance(step, Tensor):
            return distribution + left * step, 1 - left
        distribution[step.token] += left * step.chance
        left *= 1 - step.chance
    raise AssertionError("a verifier ended without a residual")


class SingleDraftVerifier(_Verifier):
    """Plain speculative sampling (arXiv 2211.17192): one draft, accepted with min(1, p/q), else (p - q)+."""

    sampling = "with"

    def steps(self, target: Tensor, draft: Tensor, tokens: Sequence[int]) -> Iterator[Trial | Tensor]:
        if len(tokens) != 1:
            raise InputError(
                f"single takes one draft per position, not {len(tokens)}; use 'kseq', 'rrs' or 'greedy' for several"
            )
        yield Trial(tokens[0], _ratio(target, draft, tokens[0]))
        yield _residual(target, draft, target)


class NaiveVerifier(_Verifier):
    """Draws from the target and looks whether that was drafted. Lossless for every way of drafting."""

    sampling = "with"

    def steps(self, target: Tensor, draft: Tensor, tokens: Sequence[int]) -> Iterator[Trial | Tensor]:
        yield target


class RecursiveRejectionVerifier(_Verifier):
    """Speculative sampling again and again, each time with what the rejection before has left of the target.

    Args:
        replacement: whether the drafts were drawn with replacement.
    """

    def __init__(self, replacement: bool = True) -> None:
        self.replacement = replacement
        self.sampling = "with" if replacement else "without"

    def steps(self, target: Tensor, draft: Tensor, tokens: Sequence[int]) -> Iterator[Trial | Tensor]:
        if not self.replacement:
            _check_distinct(tokens)
        for token in tokens:
            yield Trial(token, _ratio(target, draft, token))
            target = _residual(target, draft, target)
            if not self.replacement:
                draft = without(draft, token)
        yield target


class KSeqVerifier(_Verifier):
    """K-SEQ (arXiv 2310.15141): every draft is tested with min(1, p / (gamma q)), then comes a corrected residual.

    Args:
        gamma: the division factor, or "optimal" for the one with the most acceptance, gamma*. What is allowed depends
            on the position, [gamma*, drafts that are left], and the given one is moved into that: what comes out has
            the target's distribution in any case.
    """

    sampling = "with"

    def __init__(self, gamma: float | Literal["optimal"] = "optimal") -> None:
        if gamma != "optimal" and not (isinstance(gamma, int | float) and 1 <= gamma < float("inf")):
            raise InputError(f"gamma={gamma!r} is not allowed; give 'optimal' or a number >= 1")
        self.gamma = gamma

    def steps(self, target: Tensor, draft: Tensor, tokens: Sequence[int]) -> Iterator[Trial | Tensor]:
        k = len(tokens)
        gamma = least = _division_factor(target, draft, k, None)
        if self.gamma != "optimal":
            gamma = torch.maximum(least, least.new_tensor(min(self.gamma, k)))
        raised = gamma * draft
        for token in tokens:
            yield Trial(token, _ratio(target, raised, token))
        yield _kseq_residual(target, draft, k, gamma, bool(gamma == least))


class GreedyDraftVerifier(_Verifier):
    """The optimal verifier of the greedy draft (arXiv 2502.18779): speculative sampling with the distribution of the
    last draft.

    The residual is all of p on the most probable tokens, so that it often lands on one of them.
    """

    sampling = "greedy"

    def steps(self, target: Tensor, draft: Tensor, tokens: Sequence[int]) -> Iterator[Trial | Tensor]:
        _check_distinct(tokens)
        *top, last = tokens
        rest = draft.clone()
        rest[top] = 0
        if top and bool(rest.max() > draft[top].min()):
            raise InputError(
                f"the tokens {top} are not the {len(top)} most probable ones of the draft; draft them by 'greedy'"
            )
        rest /= rest.sum()
        yield Trial(last, _ratio(target, rest, last))
        yield _residual(target, rest, target)


VERIFIERS: dict[str, Verifier] = {
    "single": SingleDraftVerifier(),
    "naive": NaiveVerifier(),
    "rrs": RecursiveRejectionVerifier(replacement=True),
    "rrs-without": RecursiveRejectionVerifier(replacement=False),
    "kseq": KSeqVerifier(),
    "greedy": GreedyDraftVerifier(),
}


# --- K-SEQ -----------------------------------------------------------------------------------------------------


def kseq_acceptance_probability(p: Tensor, q: Tensor, k: int, gamma: float | None = None) -> Tensor:
    """Probability (...) that one of `k` drafts passes its test: 1 - (1 - beta)^k. gamma None is gamma*."""
    p, q = check_rows(p, q)
    check_count(k)
    return _any_passes(_beta(p, q, _division_factor(p, q, k, gamma)), k)


def _division_factor(target: Tensor, draft: Tensor, k: int, gamma: float | None) -> Tensor:
    """gamma* (...), the division factor with the most acceptance, or the given one if it is valid here.

    It is the root in [1, k] of 1 - (1 - beta)^k = gamma beta, where beta(gamma) = sum min(q, p / gamma), by Newton's
    method inside a shrinking bracket (arXiv 2310.15141).
    """
    low = target.new_ones(target.shape[:-1])
    if gamma is not None:
        return _valid(target, draft, k, low * gamma)
    high, root = low * k, low
    for _ in range(ITERATIONS):
        cut = target < root[..., None] * draft
        kept, reduced = (draft * ~cut).sum(-1), (target * cut).sum(-1)  # beta = kept + reduced / gamma
        beta = (kept + reduced / root).clamp(max=1)
        excess = _any_passes(beta, k) - root * beta
        slope = -k * (1 - beta) ** (k - 1) * reduced / root**2 - kept
        low, high = torch.where(excess > 0, root, low), torch.where(excess > 0, high, root)
        step = root - excess / slope
        step = torch.where((step > low) & (step < high), step, (low + high) / 2)
        done = bool(((step - root).abs() <= 1e-15 * k).all())
        root = step
        if done:
            break
    return root


def _valid(target: Tensor, draft: Tensor, k: int, gamma: Tensor) -> Tensor:
    value = float(gamma.flatten()[0])
    if not 1 - GAMMA_ERROR <= value <= k + GAMMA_ERROR:
        raise InputError(f"gamma={value:g} is not valid for {k} drafts; give a number from 1 to {k}, or 'optimal'")
    beta = _beta(target, draft, gamma)
    if bool((_any_passes(beta, k) > gamma * beta + GAMMA_ERROR).any()):
        least = float(_division_factor(target, draft, k, None).max())
        raise InputError(
            f"gamma={value:g} is not valid for these distributions: it must be at least {least:.6g}; or use 'optimal'"
        )
    return gamma


def _beta(target: Tensor, draft: Tensor, gamma: Tensor) -> Tensor:
    return torch.minimum(draft, target / gamma[..., None]).sum(-1).clamp(max=1)


def _any_passes(beta: Tensor, k: int) -> Tensor:
    return -torch.expm1(k * torch.log1p(-beta))


def _kseq_residual(target: Tensor, draft: Tensor, k: int, gamma: Tensor, optimal: bool) -> Tensor:
    gamma = gamma[..., None]
    if optimal:  # P / beta = gamma, which makes it exactly 0 on every token that can be rejected
        return _residual(target, gamma * draft, target)
    least = torch.minimum(draft, target / gamma)
    beta = least.sum(-1, keepdim=True).clamp(max=1)
    return _residual(target, least * torch.where(beta > 0, _any_passes(beta, k) / beta, 0.0), target)


# --- drafts ----------------------------------------------------------------------------------------------------


def sample_drafts(
    probs: Tensor, n: int, sampling: Sampling, generator: torch.Generator | None = None
) -> tuple[list[int], Tensor]:
    """Draw `n` tokens from a row of probabilities (vocabulary,) in one of the three ways.

    Returns:
        The tokens, and the distributions (n, vocabulary) that they were drawn from, one after another.

    Raises:
        InputError: an unknown way, n < 1, a bad row, or fewer than n tokens that can be drawn.
    """
    probs = distribution(probs, "draft")
    check_drafts(probs, n, sampling)
    if sampling == "with":
        return torch.multinomial(probs, n, True, generator=generator).tolist(), probs.expand(n, -1)
    if sampling == "without":
        tokens = torch.multinomial(probs, n, False, generator=generator).tolist()
        distributions = [probs]
        for token in tokens[:-1]:
            distributions.append(without(distributions[-1], token))
        return tokens, torch.stack(distributions)
    top = probs.topk(n - 1).indices
    distributions = torch.zeros(n, len(probs), dtype=probs.dtype, device=probs.device)
    distributions[torch.arange(n - 1, device=probs.device), top] = 1
    distributions[-1] = probs.index_fill(0, top, 0)
    distributions[-1] /= distributions[-1].sum()
    return [*top.tolist(), int(torch.multinomial(distributions[-1], 1, generator=generator))], distributions


def without(probs: Tensor, token: int) -> Tensor:
    """A copy of the row without one token, renormalized; zeros where nothing is left."""
    rest = probs.clone()
    rest[token] = 0
    return rest / rest.sum().clamp_min(torch.finfo(rest.dtype).tiny)


# --- checks and small pieces -------------------------------------------------------------------------------------


def check_rows(target: Tensor, draft: Tensor) -> tuple[Tensor, Tensor]:
    """Both as distributions in float64; what does not belong together is refused."""
    if target.shape[-1] != draft.shape[-1]:
        raise InputError(
            f"draft vocabulary {draft.shape[-1]} != target {target.shape[-1]}; the ids must mean the same tokens"
        )
    if target.shape != draft.shape:
        raise InputError(f"target {tuple(target.shape)} and draft {tuple(draft.shape)} differ; give row for row")
    return distribution(target, "target"), distribution(draft, "draft")


def distribution(probs: Tensor, name: str) -> Tensor:
    """The rows (..., vocabulary) in float64, with sums of exactly 1; what is no distribution is refused."""
    probs = probs.double()
    total = probs.sum(-1, keepdim=True)
    far, least = torch.stack([(total - 1).abs().max(), probs.min()]).tolist()
    if not (far <= ROW_ERROR and least >= 0):  # NaN and infinity end up here too
        raise InputError(
            f"a row of {name} probabilities is off: its sum is {far:.3g} away from 1, its least entry {least:.3g}; "
            "give the softmax of the processed logits in float32 or float64"
        )
    return probs / total


def check_count(n: int) -> None:
    if n < 1:
        raise InputError(f"n={n} drafts is not allowed; give a number >= 1")


def check_drafts(draft: Tensor, n: int, sampling: str) -> None:
    """Whether `n` tokens can be drawn in this way from each row (..., vocabulary)."""
    if sampling not in SAMPLINGS:
        raise InputError(f"there is no sampling {sampling!r}; use one of {', '.join(SAMPLINGS)}")
    check_count(n)
    if sampling != "with":
        choices = int((draft > 0).sum(-1).min())
        if choices < n:
            raise InputError(
                f"cannot draw {n} distinct tokens from a draft with {choices} non-zero probabilities; draw fewer, or "
                "with replacement"
            )


def _check_tokens(draft: Tensor, tokens: Sequence[int]) -> None:
    if draft.dim() != 1:
        raise InputError(f"rows of shape {tuple(draft.shape)} are not one position; give (vocabulary,)")
    if len(tokens) == 0:
        raise InputError("no token was drafted; give at least one")
    outside = [token for token in tokens if not 0 <= token < len(draft)]
    if outside:
        raise InputError(f"token {outside[0]} is outside the vocabulary of {len(draft)}")
    for token, chance in zip(tokens, draft[list(tokens)].tolist()):
        if chance == 0:
            raise InputError(
                f"token {token} was drafted but has draft probability 0; give the distribution it was drawn from"
            )


def _check_distinct(tokens: Sequence[int]) -> None:
    if len(set(tokens)) < len(tokens):
        raise InputError(f"the drafts {list(tokens)} repeat a token; draw them without replacement")


def _ratio(target: Tensor, draft: Tensor, token: int) -> float:
    p, q = torch.stack([target[token], draft[token]]).tolist()
    return min(1.0, p / q) if q > 0 else 0.0


def _residual(target: Tensor, taken: Tensor, fallback: Tensor) -> Tensor:
    """(target - taken)+, normalized; `fallback` where nothing is left, which only rounding can make necessary."""
    rest = (target - taken).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, fallback)


def _draw(distribution: Tensor, number: float) -> int:
    """The token at `number` in [0, 1) of the cumulative distribution."""
    sums = distribution.cumsum(0)
    return int(torch.searchsorted(sums, number * sums[-1], right=True))
