"""How often a draft can be accepted: the ceiling for all lossless verifiers, and what each verifier reaches.

Paper: Towards Optimal Multi-draft Speculative Decoding, arXiv 2502.18779. Acceptance means that the token that comes
out is one of the drafted ones, whether it passed a test or was drawn from the residual. By max-flow and min-cut its
highest probability over all couplings of the drafts with the target is

    1 + min over sets H of tokens of P(H) - Q(H),

where P(H) is the target's probability of H and Q(H) the probability that all drafts lie in H. Drafts with or without
replacement have a minimiser among the prefixes of the tokens in the order of q / p, largest first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...core.errors import InputError
from ...text.words import listed
from .verifiers import SAMPLINGS, VERIFIERS, Sampling, check_drafts, check_rows, kseq_acceptance_probability

__all__ = ["AcceptanceRow", "acceptance_report", "optimal_acceptance", "verifier_acceptance"]

STEP = 0.3  # of the quadrature, in ln(time); its error is below 1e-9 for up to ten drafts
TAIL = 1e-11  # what the quadrature leaves out on either side
CLOSE = 1e-12  # a lower bound this close to the best value is no better
PIECES = 64  # into which the prefixes are cut at first
HEAVY = 64  # tokens of a piece that are taken one by one; with the others RARE and TERMS give 1e-12
RARE, TERMS = 0.25, 20
BLOCK = 2**16  # numbers handled at a time, so that they stay in the processor's cache
MOST_STATES = 2**24  # numbers that the exact recursion over rejections may hold


def optimal_acceptance(p: Tensor, q: Tensor, k: int, scheme: Sampling = "without") -> Tensor:
    """The highest acceptance rate (...) that a lossless verifier of `k` drafts can have (arXiv 2502.18779).

    Args:
        p, q: target and draft probabilities (..., vocabulary).
        k: drafts per position, >= 1.
        scheme: how the drafts are drawn: "with" or "without" replacement, or "greedy".

    Raises:
        InputError: rows that are no distributions or do not match, an unknown scheme, or more distinct drafts than
            the draft distribution can give.
    """
    p, q = check_rows(p, q)
    check_drafts(q, k, scheme)
    if scheme == "greedy":
        return _greedy(p, q, k)
    p, q = _by_ratio(p, q)
    if scheme == "with" or k == 1:
        psi = p.cumsum(-1) - q.cumsum(-1) ** k
        return 1 + psi.min(-1).values.clamp(max=0)
    rows = zip(p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1]))
    return p.new_tensor([1 + _least_psi(*row, k) for row in rows]).reshape(p.shape[:-1])


def _by_ratio(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the tokens in the order of q / p, largest first; tokens that neither has come last."""
    order = (q / p).nan_to_num(nan=0.0).argsort(dim=-1, descending=True, stable=True)
    return p.gather(-1, order), q.gather(-1, order)


def _last_draft(q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The greedy draft: its k - 1 most probable tokens (..., k - 1) and the distribution of the last one."""
    top = q.topk(k - 1, -1).indices
    rest = q.scatter(-1, top, 0)
    return top, rest / rest.sum(-1, keepdim=True)


def _greedy(p: Tensor, q: Tensor, k: int) -> Tensor:
    top, rest = _last_draft(q, k)
    return p.gather(-1, top).sum(-1) + torch.minimum(p, rest).sum(-1)


def verifier_acceptance(
    p: Tensor,
    q: Tensor,
    n: int,
    verifier: str = "kseq",
    *,
    sampling: Sampling | None = None,
    explicit: bool = False,
    monte_carlo: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The acceptance rate (...) of a verifier, with `n` drafts drawn in its own way.

    Args:
        p, q: target and draft probabilities (..., vocabulary).
        verifier: a name of `VERIFIERS`.
        sampling: how the drafts are drawn, for "naive" alone, which is lossless for all of `SAMPLINGS`; the others have
            one way of their own.
        explicit: count only drafts that pass a test, not residual draws that land on a draft.
        monte_carlo: number of random paths for "rrs-without", whose exact recursion grows like vocabulary^(n - 1).

    Raises:
        InputError: bad rows, an unknown verifier, another verifier's sampling, drafts that cannot be drawn, an exact
            recursion that is too large.
    """
    if verifier not in VERIFIERS:
        raise InputError(f"there is no verifier {verifier!r}; use one of {', '.join(VERIFIERS)}")
    if verifier == "single" and n != 1:
        raise InputError(f"the verifier 'single' takes one draft, not {n}; use 'kseq', 'rrs' or 'greedy' for several")
    if monte_carlo is not None and (verifier != "rrs-without" or monte_carlo < 1):
        raise InputError(f"monte_carlo={monte_carlo} is a number of paths >= 1 for 'rrs-without'; the others are exact")
    own = VERIFIERS[verifier].sampling
    if verifier != "naive" and sampling not in (None, own):
        raise InputError(f"sampling={sampling!r} is not how {verifier!r} draws; leave it out, or use 'naive'")
    p, q = check_rows(p, q)
    check_drafts(q, n, sampling or own)
    if verifier == "kseq":
        return kseq_acceptance_probability(p, q, n)
    if verifier == "greedy":
        return torch.minimum(p, _last_draft(q, n)[1]).sum(-1) if explicit else _greedy(p, q, n)
    if verifier == "naive":
        return torch.zeros_like(p[..., 0]) if explicit else (p * _drafted(q, n, sampling or own)).sum(-1)
    if verifier == "rrs-without":
        rows = zip(p.reshape(-1, p.shape[-1]), q.reshape(-1, q.shape[-1]))
        return torch.stack([_rrs_without(*row, n, monte_carlo, generator) for row in rows]).reshape(p.shape[:-1])
    failed = torch.ones_like(p[..., 0])
    for _ in range(n):  # "rrs" and "single"
        rest = (p - q).clamp(min=0)
        chance = rest.sum(-1)
        failed = failed * chance
        p = torch.where(chance[..., None] > 0, rest / chance[..., None], p)
    return 1 - failed


def _drafted(q: Tensor, n: int, sampling: Sampling) -> Tensor:
    """The chance (..., vocabulary) that a token is among `n` drafts."""
    if sampling == "with" or n == 1:
        return -torch.expm1(n * torch.log1p(-q))
    if sampling == "greedy":
        top, rest = _last_draft(q, n)
        return rest.scatter(-1, top, 1)
    rows = [_drafted_without(row, n) for row in q.reshape(-1, q.shape[-1])]
    return torch.stack(rows).reshape(q.shape)


def _drafted_without(q: Tensor, n: int) -> Tensor:
    """The same without replacement, for one row: all drafts lie in the set of the other tokens, or not."""
    some = q > 0
    found = torch.zeros_like(q)
    if int(some.sum()) == n:
        return found.masked_fill(some, 1)
    times = _nodes(float(q[some].min()), n).to(q)
    pieces, none = _pieces(q[some], 1, times, n), torch.ones_like(times)[None]
    before, after = (_running(none, distribution, n)[:, :-1] for distribution in (pieces, pieces.flip(1)))
    start = torch.zeros_like(before[:, :1])
    start[0] = 1
    others = _product(torch.cat([start, before], 1), torch.cat([start, after], 1).flip(1), n)
    found[some] = 1 - _chance(others, q[some], times)
    return found


def _rrs_without(p: Tensor, q: Tensor, n: int, paths: int | None, generator: torch.Generator | None) -> Tensor:
    """Recursive rejection without replacement, for one row: over all orders of rejected drafts, or over random ones."""
    weight = p.new_full(
        (paths or 1,), 1 / (paths or 1)
    )  # of every state: the probability that all drafts so far failed
    p, q = p.expand(len(weight), -1), q.expand(len(weight), -1)
    for left in range(n - 1, -1, -1):
        rest = (p - q).clamp(min=0)
        chance = rest.sum(-1)
        if left == 0:
            return 1 - (weight * chance).sum()
        rejected = (q - p).clamp(min=0)  # probability that this token is drafted and fails; the sum is `chance`
        if paths:
            going = chance > 0
            state = going.nonzero().flatten()
            token = torch.multinomial(rejected[going], 1, generator=generator).flatten() if len(state) else state
            weight = weight[state] * chance[state]
        else:
            state, token = rejected.nonzero(as_tuple=True)
            weight = weight[state] * rejected[state, token]
        if not paths and len(state) * p.shape[1] > MOST_STATES:
            raise InputError(
                f"'rrs-without' with {n} drafts over {p.shape[1]} tokens has too many orders of rejection to be exact; "
                "use monte_carlo=1000, a number of random paths"
            )
        p = (rest / chance[:, None])[state]
        q = q[state].scatter(1, token[:, None], 0)
        q = q / q.sum(-1, keepdim=True)
    raise AssertionError("n is at least 1")


class AcceptanceRow(NamedTuple):
    """One line of `acceptance_report`.

    Attributes:
        n: drafts per position.
        name: a verifier, or "ceiling".
        sampling: how the drafts are drawn.
        acceptance: mean over the positions, with its standard error `error`.
        gap: how far the mean stays below the ceiling of the same drafts.
        estimated: whether it comes from random paths.
    """

    n: int
    name: str
    sampling: str
    acceptance: float
    error: float
    gap: float
    estimated: bool = False


def acceptance_report(
    p: Tensor,
    q: Tensor,
    n: Sequence[int] = (1, 2, 4),
    verifiers: Sequence[str] = ("naive", "rrs", "kseq", "rrs-without", "greedy"),
    monte_carlo: int | None = None,
    generator: torch.Generator | None = None,
) -> list[AcceptanceRow]:
    """Ceilings and verifiers side by side, averaged over positions.

    Args:
        p, q: target and draft probabilities (positions, vocabulary), under the same processors.
        monte_carlo: as in `verifier_acceptance`.
    """
    rows = []
    for count in n:
        ceilings = {scheme: optimal_acceptance(p, q, count, scheme) for scheme in SAMPLINGS}
        for scheme, ceiling in ceilings.items():
            rows.append(AcceptanceRow(count, "ceiling", scheme, *_mean(ceiling), 0.0))
        for name in listed(verifiers, "verifier"):
            paths = monte_carlo if name == "rrs-without" else None
            reached = verifier_acceptance(p, q, count, name, monte_carlo=paths, generator=generator)
            scheme = VERIFIERS[name].sampling
            gap = float((ceilings[scheme] - reached).mean())
            rows.append(AcceptanceRow(count, name, scheme, *_mean(reached), gap, paths is not None))
    return rows


def _mean(values: Tensor) -> tuple[float, float]:
    values = values.flatten()
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan
    return float(values.mean()), error


# --- without replacement -----------------------------------------------------------------------------------------
#
# Let every token x arrive at an exponential time of rate q(x); the order of arrival is a draw without replacement.
# Q(H) is the probability that k tokens of H have arrived when the first token outside H does:
#
#     Q(H) = integral over t of lam e^(-lam t) Pr[N(t) >= k],   lam = 1 - q(H),
#
# where N(t) is a sum of independent Bernoulli(1 - e^(-q t)) over H. In z = ln t the integrand falls exponentially to
# the left and doubly exponentially to the right, so that the trapezoid rule converges geometrically. The distribution
# of N is kept as a polynomial cut off at degree k - 1; a product of polynomials has positive terms only and loses no
# digits. The many tokens that have hardly arrived by the time t are taken together.
#
# Along the prefixes Q is a convex function of q(H), and so lies below its chords. Between two prefixes where Q is
# known, P minus the chord bounds P - Q from below; only pieces whose bound beats the best value are cut further.


def _least_psi(p: Tensor, q: Tensor, k: int) -> float:
    """min of P - Q over the prefixes of one row (vocabulary,) that is sorted by q / p."""
    mass = torch.cat([p.new_zeros(1), p.cumsum(0)])  # P of the prefix of each length
    inside = torch.cat([q.new_zeros(1), q.cumsum(0)])
    outside = torch.cat([q.flip(0).cumsum(0).flip(0), q.new_zeros(1)])  # 1 - inside would lose the small ones
    best = min(0.0, float((mass - _least_chance(q, outside, k)).min()))
    hopeful = ((mass - inside**k < best - CLOSE) & (outside > 0)).nonzero()
    if len(hopeful) == 0:
        return best
    start, stop, count = 0, int(hopeful[-1]), PIECES
    times = _nodes(float(outside[stop]), k).to(q)
    distribution, known = torch.ones_like(times)[None], 0.0  # of the prefix of length `start`
    while True:
        size = 1 << max(0, math.ceil(math.log2((stop - start) / count)))
        distributions = _running(distribution, _pieces(q[start:stop], size, times, k), k)
        ends = torch.arange(start + size, stop + size, size, device=q.device).clamp(max=stop)
        chances = _chance(distributions, outside[ends], times)
        best = min(best, float((mass[ends] - chances).min()))
        before = torch.cat([chances.new_tensor([known]), chances[:-1]])
        hopeful = (_bounds(mass, inside, start, ends, size, before, chances) < best - CLOSE).nonzero()
        if size == 1 or len(hopeful) == 0:
            return best
        first, last = int(hopeful[0]), int(hopeful[-1])
        if first > 0:
            distribution, known = distributions[:, first - 1], float(before[first])
        start, stop, count = start + first * size, int(ends[last]), 2 * count  # more pieces: it ends in any case


def _least_chance(q: Tensor, outside: Tensor, k: int) -> Tensor:
    """A lower bound of Q for every prefix: a draft lies in H least often when the most probable tokens are gone."""
    largest, where = q.topk(k)
    left = q.index_fill(0, where, 0).sum() + largest.flip(0).cumsum(0).flip(0)  # before each of the k draws
    return ((left - outside[:, None]).clamp(min=0) / left).prod(1)


def _bounds(
    mass: Tensor, inside: Tensor, start: int, ends: Tensor, size: int, before: Tensor, chances: Tensor
) -> Tensor:
    """The least that P - Q can be within each piece: P minus the chord of Q, at every prefix."""
    lengths = torch.arange(start, start + len(ends) * size, device=ends.device).clamp(max=int(ends[-1]))
    lengths = lengths.reshape(len(ends), size)
    left, right = inside[lengths[:, :1]], inside[ends][:, None]
    share = ((inside[lengths] - left) / (right - left)).nan_to_num(nan=0.0)
    return (mass[lengths] - torch.lerp(before[:, None], chances[:, None], share)).min(1).values


def _nodes(least: float, k: int) -> Tensor:
    """Times (nodes,) that serve all sets whose lam is at least `least`."""
    low = math.log(TAIL * math.factorial(k) * (k + 1)) / (k + 1)  # as Pr[N(t) >= k] <= t^k / k!
    high = math.log(-math.log(TAIL) / least)
    return torch.exp(torch.arange(low, high + STEP, STEP, dtype=torch.float64))


def _chance(distributions: Tensor, outside: Tensor, times: Tensor) -> Tensor:
    """Q (sets,) from the distributions of arrivals (k, sets, nodes) and lam = 1 - q(H) (sets,)."""
    rate = outside[:, None] * times
    return STEP * (rate * torch.exp(-rate) * (1 - distributions.sum(0))).sum(1)


def _pieces(q: Tensor, size: int, times: Tensor, k: int) -> Tensor:
    """Distribution of the arrivals in each piece of `size` tokens: (k, pieces, nodes)."""
    count = -(-len(q) // size)
    rates = torch.nn.functional.pad(q, (0, count * size - len(q))).reshape(count, size)
    if size <= 2 * HEAVY:
        return _all_arrivals(rates, times, k)
    rates = rates.sort(1, descending=True).values
    heavy, rest = rates[:, :HEAVY], rates[:, HEAVY:]
    early = int((times * rest.max() <= RARE).sum())
    distribution = [_rare_arrivals(rest, times[:early], k)] if early else []
    if early < len(times):
        distribution.append(_all_arrivals(rest, times[early:], k))
    return _product(_all_arrivals(heavy, times, k), torch.cat(distribution, -1), k)


def _rare_arrivals(rates: Tensor, times: Tensor, k: int) -> Tensor:
    """As `_all_arrivals`, for rates * times <= RARE: the coefficients are elementary symmetric polynomials of
    e^(rate t) - 1, by Newton's identities from power sums, and these by series from the moments of the rates."""
    scaled, power, moments = rates * times[-1], 1.0, []
    for _ in range(TERMS):
        power = scaled * power
        moments.append(power.sum(1))
    powers = (times / times[-1]) ** torch.arange(1, TERMS + 1, device=times.device)[:, None]
    sums = torch.einsum("mr,rp,rn->mpn", _series(k - 1).to(rates), torch.stack(moments), powers)
    distribution = [torch.ones_like(sums[0])]
    for j in range(1, k):
        distribution.append(sum((-1) ** (i + 1) * distribution[j - i] * sums[i - 1] for i in range(1, j + 1)) / j)
    return torch.stack(distribution) * torch.exp(-rates.sum(1)[:, None] * times)


def _series(most: int) -> Tensor:
    """Coefficients (most, TERMS) of y, y^2, ... in (e^y - 1)^m, for m = 1 to `most`."""
    one = np.array([0.0, *(1 / math.factorial(r) for r in range(1, TERMS + 1))])
    rows = [one]
    for _ in range(most - 1):
        rows.append(np.convolve(rows[-1], one)[: TERMS + 1])
    return torch.from_numpy(np.array(rows)[:, 1:])


def _all_arrivals(rates: Tensor, times: Tensor, k: int) -> Tensor:
    """Distribution of the arrivals among all tokens of each row of rates (pieces, tokens): (k, pieces, nodes)."""
    size = 1 << (rates.shape[1] - 1).bit_length()
    rates = torch.nn.functional.pad(rates, (0, size - rates.shape[1]))
    blocks = rates.split(max(1, BLOCK // (size * len(times))))
    return torch.cat([_block_arrivals(block, times, k) for block in blocks], 1)


def _block_arrivals(rates: Tensor, times: Tensor, k: int) -> Tensor:
    size = rates.shape[1]
    absent = torch.exp(rates.T[:, :, None] * -times)
    if size == 1:
        return torch.cat([absent, 1 - absent])
    size //= 2
    first, second = absent[:size], absent[size:]
    distribution = absent.new_empty(3, *first.shape)  # pairs of tokens, written in place: half of the time goes here
    torch.mul(first, second, out=distribution[0])
    torch.add(first, second, out=distribution[1])
    torch.sub(distribution[0], distribution[1], out=distribution[2]).add_(1)
    distribution[1].sub_(distribution[0], alpha=2)
    distribution = distribution[:k]
    while size > 1:
        size //= 2
        distribution = _product(distribution[:, :size], distribution[:, size:], k)
    return distribution[:, 0]


def _running(distribution: Tensor, pieces: Tensor, k: int) -> Tensor:
    """Distribution of the arrivals in all pieces up to each one, after `distribution`; doubling the reach in every
    round."""
    reach = 1
    while reach < pieces.shape[1]:
        joined = _product(pieces[:, :-reach], pieces[:, reach:], k)
        head = torch.nn.functional.pad(pieces[:, :reach], (0, 0, 0, 0, 0, len(joined) - len(pieces)))
        pieces = torch.cat([head, joined], 1)
        reach *= 2
    return _product(distribution[:, None], pieces, k)


def _product(a: Tensor, b: Tensor, k: int) -> Tensor:
    """Product of polynomials (coefficients, ...), cut off after k coefficients."""
    product = b.new_empty(min(k, len(a) + len(b) - 1), *b.shape[1:])
    torch.mul(a[0], b, out=product[: len(b)])
    product[len(b) :] = 0
    for i in range(1, min(k, len(a))):
        part = product[i : i + len(b)]
        part.addcmul_(a[i], b[: len(part)])
    return product
