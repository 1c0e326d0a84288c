"""Verifiers: the output distribution equals the target's by enumeration, for one position and for chains of three."""

import itertools
import math
from functools import lru_cache

import pytest
import torch
from support.oracles import draft_distribution, drafts_exist, enumerated, random_pair, row

from tokenry.core.errors import InputError
from tokenry.decode.speculation import verifiers
from tokenry.decode.speculation.verifiers import (
    SAMPLINGS,
    VERIFIERS,
    GreedyDraftVerifier,
    KSeqVerifier,
    NaiveVerifier,
    RecursiveRejectionVerifier,
    SingleDraftVerifier,
    kseq_acceptance_probability,
    output_distribution,
    sample_drafts,
)

SEVERAL = [name for name in VERIFIERS if name != "single"]


def kseq_division_factor(p, q, k):
    return verifiers._division_factor(p, q, k, None)


def kseq_residual(p, q, k, gamma=None):
    return verifiers._kseq_residual(p, q, k, verifiers._division_factor(p, q, k, gamma), gamma is None)


# --- losslessness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_output_distribution_is_the_targets(name, n):
    verifier = VERIFIERS[name]
    for seed in range(12):
        p, q = random_pair(seed, 3 + seed % (4 if n < 4 else 2))
        if drafts_exist(q, n, verifier.sampling):
            distribution, _, _ = enumerated(verifier, p, q, n)
            assert torch.allclose(distribution, p, rtol=0, atol=1e-10), seed


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_the_naive_verifier_is_lossless_for_any_drafts(sampling):
    p, q = random_pair(1, 4)
    distribution = sum(
        c * output_distribution(NaiveVerifier(), p, q, t)[0] for t, c in draft_distribution(q, 2, sampling)
    )
    assert torch.allclose(distribution, p, rtol=0, atol=1e-12)


@pytest.mark.parametrize("factor", [1.0, 1.1, 1.5])
def test_every_valid_division_factor_is_lossless(factor):
    for seed in range(6):
        p, q = random_pair(seed, 4)
        gamma = min(3.0, factor * float(kseq_division_factor(p, q, 3)))
        distribution, passed, _ = enumerated(KSeqVerifier(gamma), p, q, 3)
        assert torch.allclose(distribution, p, rtol=0, atol=1e-10)
        assert passed == pytest.approx(float(kseq_acceptance_probability(p, q, 3, gamma)), abs=1e-12)
    distribution, _, _ = enumerated(KSeqVerifier(3.0), p, q, 3)
    assert torch.allclose(distribution, p, rtol=0, atol=1e-10)


SURVIVORS = [(name, VERIFIERS[name]) for name in SEVERAL] + [(f"kseq {g}", KSeqVerifier(g)) for g in (1, 1.6, 2.5, 9)]


@pytest.mark.parametrize(("name", "verifier"), SURVIVORS, ids=[name for name, _ in SURVIVORS])
@pytest.mark.parametrize("left", [1, 2, 3])
def test_every_verifier_takes_as_many_drafts_as_are_left(name, verifier, left):
    """Whatever number it was set up for: fewer may survive, or be drawn after truncation."""
    for seed in range(8):
        p, q = random_pair(seed, 4)
        if drafts_exist(q, left, verifier.sampling):
            distribution, passed, _ = enumerated(verifier, p, q, left)
            assert torch.allclose(distribution, p, rtol=0, atol=1e-10), seed
            if left == 1 and name != "naive":
                assert passed == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-10)


@pytest.mark.parametrize("gamma", [1, 1.6, 2.5, 9])
def test_whole_drafts_with_a_fixed_division_factor_keep_the_chain(gamma):
    p, q = chain(3, 3, seed=5)
    distribution, _ = completed_distribution(KSeqVerifier(gamma), p, q, 3, 2, whole_drafts(q, 3, 2, 3))
    wanted = target_distribution(p, (), 3)
    assert max(abs(distribution[tokens] - wanted[tokens]) for tokens in wanted) < 1e-10


def test_disjoint_supports_give_the_target():
    p, q = row(0, 0, 0.25, 0.75), row(0.5, 0.5, 0, 0)
    for name in SEVERAL:
        distribution, passed, drafted = enumerated(VERIFIERS[name], p, q, 2)
        assert torch.allclose(distribution, p) and passed == drafted == 0
    assert torch.equal(kseq_residual(p, q, 2), p) and torch.equal(kseq_residual(p, q, 2, 2.0), p)


@pytest.mark.parametrize("name", SEVERAL)
def test_equal_rows_always_accept(name):
    p = row(0.5, 0.25, 0.125, 0.125)
    _, passed, drafted = enumerated(VERIFIERS[name], p, p, 2)
    assert drafted == pytest.approx(1) if name != "naive" else drafted < 1
    if name not in ("naive", "greedy"):
        assert passed == pytest.approx(1)


@pytest.mark.parametrize("name", SEVERAL)
def test_a_target_without_chance_gives_its_token(name):
    """Temperature 0: the most probable token comes out, whatever was drafted."""
    p, q = row(0, 0, 1, 0), row(0.4, 0.3, 0.2, 0.1)
    for tokens, _ in draft_distribution(q, 2, VERIFIERS[name].sampling):
        assert output_distribution(VERIFIERS[name], p, q, tokens)[0].tolist() == p.tolist()


# --- chains: three positions, full drafts, membership -----------------------------------------------------------------


def chain(size, length, seed):
    """Random target and draft tables: context -> row."""
    generator = torch.Generator().manual_seed(seed)
    contexts = [c for n in range(length + 1) for c in itertools.product(range(size), repeat=n)]
    tables = torch.randn(2, len(contexts), size, generator=generator, dtype=torch.float64).mul(1.5).softmax(-1)
    return [dict(zip(contexts, table)) for table in tables]


def target_distribution(p, prefix, length):
    """Law of the tokens up to `length`, given the first ones."""
    distributions = {prefix: 1.0}
    for _ in range(length - len(prefix)):
        distributions = {
            (*c, y): chance * float(p[c][y]) for c, chance in distributions.items() for y in range(len(p[c]))
        }
    return distributions


def completed_distribution(verifier, p, q, size, length, drafts):
    """Law of `length + 1` tokens: what one step emits, completed by the target. Also the mean number emitted."""
    total, emitted = {}, 0.0
    rows = lru_cache(maxsize=None)(lambda c, tokens: output_distribution(verifier, p[c], q[c], tokens)[0].tolist())
    for chance, start in drafts:
        states = [((), chance, start)]
        while states:
            context, weight, alive = states.pop()
            if len(context) == length or not alive[0]:
                out = len(context) + (len(context) == length and bool(alive[1]))
                emitted += weight * out
                for tokens, c in target_distribution(p, context, length + 1).items():
                    total[tokens] = total.get(tokens, 0.0) + weight * c
                continue
            for tokens, extra in alive[0](context):
                for y, c in enumerate(rows(context, tokens)):
                    if weight * extra * c > 0:
                        states.append(((*context, y), weight * extra * c, alive[1](context, tokens, y)))
    return total, emitted


def whole_drafts(q, size, length, paths):
    """All sets of independent drafts of full length, with their probabilities; those that agree stay alive."""

    def probability(path):
        return math.prod(float(q[path[:i]][token]) for i, token in enumerate(path))

    def start(alive):
        def draw(context):
            yield tuple(path[len(context)] for path in alive), 1.0

        def survive(context, tokens, y):
            left = [path for path, token in zip(alive, tokens) if token == y]
            return start(left) if left else (None, False)

        return draw, survive

    every = list(itertools.product(range(size), repeat=length))
    return [(math.prod(map(probability, some)), start(some)) for some in itertools.product(every, repeat=paths)]


@pytest.mark.parametrize("name", ["rrs", "kseq"])
@pytest.mark.parametrize(("size", "length", "paths"), [(3, 2, 2), (2, 3, 3), (3, 3, 2)])
def test_whole_drafts_with_replacement_keep_the_chain(name, size, length, paths):
    p, q = chain(size, length + 1, seed=size + length)
    distribution, emitted = completed_distribution(
        VERIFIERS[name], p, q, size, length, whole_drafts(q, size, length, paths)
    )
    wanted = target_distribution(p, (), length + 1)
    assert max(abs(distribution[tokens] - wanted[tokens]) for tokens in wanted) < 1e-10
    _, single = completed_distribution(VERIFIERS[name], p, q, size, length, whole_drafts(q, size, length, 1))
    assert 1 < single < emitted < length + 1


@pytest.mark.parametrize("name", ["rrs-without", "greedy", "kseq", "rrs"])
def test_trees_keep_the_chain(name):
    """Every node has two children of its own; three levels."""
    size, length = 3, 3
    p, q = chain(size, length + 1, seed=7)
    verifier = VERIFIERS[name]

    def draw(context):
        return [
            (tokens, chance) for tokens, chance in draft_distribution(q[context], 2, verifier.sampling) if chance > 0
        ]

    def go_on(context, tokens, y):
        return (draw, go_on) if y in tokens else (None, False)

    distribution, _ = completed_distribution(verifier, p, q, size, length, [(1.0, (draw, go_on))])
    wanted = target_distribution(p, (), length + 1)
    assert max(abs(distribution[tokens] - wanted[tokens]) for tokens in wanted) < 1e-10


# --- select follows the distribution ---------------------------------------------------------------------------------


def plain_speculative(p, q, token, numbers):
    """Speculative sampling as in arXiv 2211.17192, with two given random numbers."""
    if numbers[0] < min(1.0, float(p[token] / q[token])):
        return token, True
    rest = (p - q).clamp(min=0)
    sums = (rest / rest.sum()).cumsum(0)
    return int((sums <= numbers[1] * sums[-1]).sum()), False


@pytest.mark.parametrize("name", [name for name in VERIFIERS if name != "naive"])
def test_one_draft_is_plain_speculative_sampling(name):
    verifier = VERIFIERS[name]
    for seed in range(60):
        p, q = random_pair(seed % 4 + 1, 6)
        (token,), _ = sample_drafts(q, 1, verifier.sampling, torch.Generator().manual_seed(seed))
        numbers = torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        selection = verifier.select(p, q, [token], torch.Generator().manual_seed(seed))
        assert selection == plain_speculative(p, q, token, numbers)


@pytest.mark.parametrize("name", SEVERAL)
def test_select_follows_the_plan(name):
    """With given random numbers select does what the tests and the residual say."""
    verifier = VERIFIERS[name]
    for seed in range(40):
        p, q = random_pair(seed % 2 + 1, 6)
        tokens, _ = sample_drafts(q, 3, verifier.sampling, torch.Generator().manual_seed(seed))
        numbers = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        wanted = None
        for step, number in zip(verifier.steps(p, q, tokens), numbers):
            if isinstance(step, torch.Tensor):
                wanted = (int((step.cumsum(0) <= number * step.sum()).sum()), False)
            elif number < step.chance:
                wanted = (step.token, True)
            if wanted:
                break
        assert verifier.select(p, q, tokens, torch.Generator().manual_seed(seed)) == wanted


@pytest.mark.parametrize("name", SEVERAL)
def test_select_has_the_target_distribution_when_run(name):
    """4,000 real runs, drafts included: chi-square against the target, and the flag against its probability."""
    verifier, runs = VERIFIERS[name], 4000
    p, q = random_pair(2, 5)
    generator = torch.Generator().manual_seed(0)
    counts, passed = torch.zeros(5), 0
    for _ in range(runs):
        tokens, _ = sample_drafts(q, 2, verifier.sampling, generator)
        token, accepted = verifier.select(p, q, tokens, generator)
        counts[token] += 1
        passed += accepted
    assert float(((counts - runs * p) ** 2 / (runs * p)).sum()) < 23.5  # the 1e-4 point of chi-square with 4 degrees
    expected = enumerated(verifier, p, q, 2)[1]
    assert abs(passed / runs - expected) <= 4 * (expected * (1 - expected) / runs) ** 0.5 + 1e-9


def test_a_token_that_the_target_never_says_cannot_pass(monkeypatch):
    """A random number of exactly 0 passes no test of chance 0."""
    monkeypatch.setattr(torch, "rand", lambda n, **options: torch.zeros(n, dtype=torch.float64))
    p, q = row(0, 0.5, 0.5), row(0.6, 0.3, 0.1)
    assert SingleDraftVerifier().select(p, q, [0]).token == 1
    for name in ("rrs", "kseq"):
        assert VERIFIERS[name].select(p, q, [0, 0]).token == 1


@pytest.mark.parametrize("name", SEVERAL)
def test_the_order_of_the_vocabulary_does_not_matter(name):
    p, q = random_pair(2, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    tokens, _ = sample_drafts(q, 2, VERIFIERS[name].sampling, torch.Generator().manual_seed(3))
    moved = [int((order == token).nonzero()) for token in tokens]
    distribution, accepted = output_distribution(VERIFIERS[name], p, q, tokens)
    other, other_accepted = output_distribution(VERIFIERS[name], p[order], q[order], moved)
    assert torch.allclose(distribution[order], other, atol=1e-14) and accepted == pytest.approx(other_accepted)


@pytest.mark.parametrize("name", SEVERAL)
def test_rows_are_left_as_they_are(name):
    p, q = random_pair(2, 5)
    before = p.clone(), q.clone()
    tokens, _ = sample_drafts(q, 3, VERIFIERS[name].sampling, torch.Generator().manual_seed(1))
    VERIFIERS[name].select(p, q, tokens, torch.Generator().manual_seed(1))
    assert torch.equal(p, before[0]) and torch.equal(q, before[1])


def test_float32_rows_of_a_real_vocabulary():
    logits = torch.randn(2, 49152, generator=torch.Generator().manual_seed(0)) * 3
    p, q = logits.softmax(-1)
    for name in SEVERAL:
        tokens, _ = sample_drafts(q, 4, VERIFIERS[name].sampling, torch.Generator().manual_seed(1))
        token, _ = VERIFIERS[name].select(p, q, tokens, torch.Generator().manual_seed(2))
        assert p[token] > 0


# --- residuals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rrs", "kseq", "greedy"])
def test_the_residual_is_what_the_tests_leave(name):
    """Where the residual does not depend on the drafts it is the target less what passes, normalized."""
    verifier = VERIFIERS[name]
    for seed in (1, 2, 5):
        p, q = random_pair(seed, 5)
        passed = torch.zeros_like(p)
        residuals = []
        for tokens, chance in draft_distribution(q, 3, verifier.sampling):
            *trials, residual = verifier.steps(p, q, tokens)
            left = chance
            for token, accept in trials:
                passed[token] += left * accept
                left *= 1 - accept
            residuals.append(residual)
        assert all(torch.equal(residuals[0], other) for other in residuals)
        assert torch.allclose(residuals[0], (p - passed) / (1 - passed.sum()), atol=1e-12)


def test_the_residual_without_replacement_depends_on_the_order_of_rejections():
    p, q = row(0.7, 0.2, 0.1), row(0.1, 0.3, 0.6)
    first, second = (list(RecursiveRejectionVerifier(False).steps(p, q, t))[-1] for t in ((2, 1), (1, 2)))
    once = (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()
    for residual, gone in ((first, 2), (second, 1)):
        rest = q.clone()
        rest[gone] = 0
        again = (once - rest / rest.sum()).clamp(min=0)
        assert torch.allclose(residual, again / again.sum())


def test_the_greedy_residual_keeps_the_top_tokens_whole():
    """p on the top tokens and (p - last draft's distribution)+ elsewhere."""
    p, q = row(0.4, 0.3, 0.2, 0.1), row(0.1, 0.2, 0.3, 0.4)
    trial, residual = GreedyDraftVerifier().steps(p, q, [3, 0])
    assert trial == (0, 1.0)
    assert torch.allclose(residual, row(0.4 - 1 / 6, 0, 0, 0.1) / (0.5 - 1 / 6))


# --- K-SEQ -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("p", "q", "k", "gamma", "beta", "acceptance", "residual"),
    [
        ((0.6, 0.3, 0.1), (0.2, 0.3, 0.5), 1, 1.0, 0.6, 0.6, (1, 0, 0)),
        ((0.6, 0.3, 0.1), (0.2, 0.3, 0.5), 2, 1.540312, 0.459688, 0.708062, (1, 0, 0)),
        ((0.6, 0.3, 0.1), (0.2, 0.3, 0.5), 3, 1.948368, 0.405300, 0.789674, (1, 0, 0)),
        ((0.5, 0.5), (0.9, 0.1), 2, 1.584429, None, 0.658443, (0, 1)),
        ((0.4, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4), 2, 1.5, 0.5, 0.75, None),
        ((0.4, 0.3, 0.2, 0.1), (0.1, 0.2, 0.3, 0.4), 3, None, None, 0.793950, None),
    ],
)
def test_worked_values_of_kseq(p, q, k, gamma, beta, acceptance, residual):
    p, q = row(*p), row(*q)
    found = float(kseq_division_factor(p, q, k))
    assert gamma is None or found == pytest.approx(gamma, abs=1e-6)
    assert beta is None or float(torch.minimum(q, p / found).sum()) == pytest.approx(beta, abs=1e-6)
    assert float(kseq_acceptance_probability(p, q, k)) == pytest.approx(acceptance, abs=1e-6)
    assert float(torch.minimum(found * q, p).sum()) == pytest.approx(acceptance, abs=1e-6)
    if residual is not None:
        for given in (None, found):
            assert torch.allclose(kseq_residual(p, q, k, given), row(*residual), atol=1e-9)
    _, passed, drafted = enumerated(KSeqVerifier(), p, q, k)
    assert passed == pytest.approx(acceptance, abs=1e-6) and drafted == pytest.approx(acceptance, abs=1e-6)


def by_bisection(p, q, k):
    def excess(g):
        beta = float(torch.minimum(q, p / g).sum())
        return 1 - (1 - beta) ** k - g * beta

    low, high = 1.0, float(k)
    if excess(low) <= 0:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if excess(middle) <= 0 else (middle, high)
    return high


def test_the_division_factor_is_the_root():
    for seed in range(60):
        p, q = random_pair(seed, 2 + seed % 40)
        for k in (2, 3, 8):
            gamma = float(kseq_division_factor(p, q, k))
            beta = float(torch.minimum(q, p / gamma).sum())
            assert 1 <= gamma <= k and abs(1 - (1 - beta) ** k - gamma * beta) < 1e-14
            if 1e-9 < beta < 1 - 1e-9:  # elsewhere the root is not a point
                assert gamma == pytest.approx(by_bisection(p, q, k), abs=1e-9)
            factors = [float(kseq_acceptance_probability(p, q, k, g)) for g in (gamma, (gamma + k) / 2, k)]
            assert factors == sorted(factors, reverse=True)


def test_division_factors_of_many_rows_are_those_of_each():
    p, q = torch.randn(2, 2, 5, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    together = kseq_division_factor(p, q, 4), kseq_acceptance_probability(p, q, 4), kseq_residual(p, q, 4)
    for i, j in itertools.product(range(2), range(5)):
        alone = (f(p[i, j], q[i, j], 4) for f in (kseq_division_factor, kseq_acceptance_probability, kseq_residual))
        assert all(torch.allclose(a, b[i, j], atol=1e-13) for a, b in zip(alone, together))


def test_more_drafts_accept_more():
    for seed in range(20):
        p, q = random_pair(seed, 8)
        rates = [float(kseq_acceptance_probability(p, q, k)) for k in range(1, 9)]
        assert all(b >= a - 1e-12 for a, b in itertools.pairwise(rates))


# --- drafts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_drafts_have_their_distribution(sampling):
    _, q = random_pair(2, 4)
    generator, runs, counts = torch.Generator().manual_seed(0), 5000, {}
    for _ in range(runs):
        tokens, _ = sample_drafts(q, 2, sampling, generator)
        counts[tuple(tokens)] = counts.get(tuple(tokens), 0) + 1
    distribution = {tokens: chance for tokens, chance in draft_distribution(q, 2, sampling) if chance > 0}
    assert set(counts) <= set(distribution)
    assert (
        sum((counts.get(t, 0) - runs * c) ** 2 / (runs * c) for t, c in distribution.items()) < 45
    )  # 15 degrees at most


def test_the_distributions_of_successive_drafts():
    q = row(0.1, 0.2, 0.3, 0.4)
    tokens, distributions = sample_drafts(q, 3, "without", torch.Generator().manual_seed(0))
    assert len(set(tokens)) == 3 and torch.equal(distributions[0], q)
    assert (
        distributions[1][tokens[0]] == 0
        and distributions[2][tokens[1]] == 0
        and torch.allclose(distributions.sum(1), torch.ones(3).double())
    )
    tokens, distributions = sample_drafts(q, 3, "greedy", torch.Generator().manual_seed(0))
    assert (
        tokens[:2] == [3, 2]
        and distributions[0].argmax() == 3
        and torch.allclose(distributions[2], row(1 / 3, 2 / 3, 0, 0))
    )
    _, distributions = sample_drafts(q, 3, "with", torch.Generator().manual_seed(0))
    assert torch.equal(distributions, q.expand(3, -1))


def test_all_tokens_can_be_drawn_without_replacement():
    q = row(0.5, 0.5, 0)
    assert sorted(sample_drafts(q, 2, "without", torch.Generator().manual_seed(0))[0]) == [0, 1]
    assert sorted(sample_drafts(q, 2, "greedy", torch.Generator().manual_seed(0))[0]) == [0, 1]


# --- bad input -------------------------------------------------------------------------------------------------------

P, Q = row(0.6, 0.3, 0.1), row(0.2, 0.3, 0.5)


@pytest.mark.parametrize(
    ("p", "q", "message"),
    [
        (torch.full((49152,), 1 / 49152), torch.full((32000,), 1 / 32000), "draft vocabulary 32000 != target 49152"),
        (P.expand(2, -1), Q, "differ; give row for row"),
        (P * 1.001, Q, "target probabilities is off: its sum is 0.001 away"),
        (P, Q * 0.99, "draft probabilities is off"),
        (row(0.6, float("nan"), 0.4), Q, "target probabilities is off"),
        (row(float("inf"), 0, 0), Q, "target probabilities is off"),
        (P, row(1.2, -0.2, 0), "its least entry -0.2"),
    ],
)
def test_bad_rows_are_refused(p, q, message):
    for use in (
        lambda: KSeqVerifier().select(p, q, [0]),
        lambda: kseq_acceptance_probability(p, q, 2),
    ):
        with pytest.raises(InputError, match=message):
            use()


def test_half_precision_rows_are_refused():
    q = (torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 2).softmax(-1).bfloat16()
    with pytest.raises(InputError, match="softmax of the processed logits in float32"):
        sample_drafts(q, 2, "with")


@pytest.mark.parametrize(
    ("name", "tokens", "message"),
    [
        ("kseq", [], "no token was drafted"),
        ("kseq", [3], "token 3 is outside the vocabulary of 3"),
        ("kseq", [-1], "token -1 is outside"),
        ("single", [0, 1], "single takes one draft per position, not 2"),
        ("rrs-without", [1, 1], "repeat a token"),
        ("greedy", [2, 2], "repeat a token"),
        ("greedy", [0, 2], r"the tokens \[0\] are not the 1 most probable"),
    ],
)
def test_bad_drafts_are_refused(name, tokens, message):
    with pytest.raises(InputError, match=message):
        VERIFIERS[name].select(P, Q, tokens)


def test_a_draft_that_could_not_be_drawn_is_refused():
    for name in SEVERAL:
        with pytest.raises(InputError, match="token 1 was drafted but has draft probability 0"):
            VERIFIERS[name].select(P, row(0.5, 0, 0.5), [1])
    with pytest.raises(InputError, match="not one position"):
        KSeqVerifier().select(P.expand(2, -1), Q.expand(2, -1), [0])


@pytest.mark.parametrize("gamma", [0.5, -1, float("inf"), float("nan"), "best", None])
def test_a_bad_division_factor_is_refused(gamma):
    with pytest.raises(InputError, match="give 'optimal' or a number >= 1"):
        KSeqVerifier(gamma)


def test_a_division_factor_out_of_range_is_refused():
    with pytest.raises(InputError, match=r"gamma=1 is not valid for these distributions: it must be at least 1\.54031"):
        kseq_acceptance_probability(P, Q, 2, 1)
    with pytest.raises(InputError, match=r"gamma=2\.5 is not valid for 2 drafts; give a number from 1 to 2"):
        kseq_acceptance_probability(P, Q, 2, 2.5)
    with pytest.raises(InputError, match=r"at least 1\.54031"):
        kseq_acceptance_probability(P, Q, 2, 1.2)
    with pytest.raises(InputError, match="n=0 drafts is not allowed"):
        kseq_acceptance_probability(P, Q, 0)


@pytest.mark.parametrize(
    ("n", "sampling", "message"),
    [
        (0, "with", "n=0 drafts is not allowed"),
        (2, "beam", "no sampling 'beam'; use one of with, without, greedy"),
        (3, "without", "cannot draw 3 distinct tokens from a draft with 2 non-zero probabilities"),
        (3, "greedy", "cannot draw 3 distinct tokens"),
    ],
)
def test_drafts_that_cannot_be_drawn_are_refused(n, sampling, message):
    with pytest.raises(InputError, match=message):
        sample_drafts(row(0.5, 0.5, 0), n, sampling)


def test_the_names_of_the_command_line():
    assert list(VERIFIERS) == ["single", "naive", "rrs", "rrs-without", "kseq", "greedy"]
    assert {v.sampling for v in VERIFIERS.values()} == set(verifiers.SAMPLINGS)
