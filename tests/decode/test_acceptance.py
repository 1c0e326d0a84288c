"""Ceilings against a linear program and brute force over subsets; formulas against enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from support.oracles import draft_distribution, drafts_exist, enumerated, random_pair, row

from tokenry.core.errors import InputError
from tokenry.decode.speculation import acceptance
from tokenry.decode.speculation.acceptance import acceptance_report, optimal_acceptance, verifier_acceptance
from tokenry.decode.speculation.verifiers import SAMPLINGS, VERIFIERS, kseq_acceptance_probability

THREE = row(0.6, 0.3, 0.1), row(0.2, 0.3, 0.5)
FOUR = row(0.4, 0.3, 0.2, 0.1), row(0.1, 0.2, 0.3, 0.4)
TOLERANCE = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
SEVERAL = [name for name in VERIFIERS if name != "single"]


def ceiling(p, q, n, scheme):
    return float(optimal_acceptance(p, q, n, scheme))


def by_linear_program(p, q, n, scheme):
    """Max of Pr[y among the drafts] over couplings of the drafts with y ~ p."""
    drafts = [(set(tokens), chance) for tokens, chance in draft_distribution(q, n, scheme) if chance > 0]
    size, count = len(p), len(drafts)
    gain = np.array([[-float(y in tokens) for y in range(size)] for tokens, _ in drafts])
    sums = np.zeros((count + size, count, size))
    for i in range(count):
        sums[i, i] = 1
    for y in range(size):
        sums[count + y, :, y] = 1
    totals = np.array([chance for _, chance in drafts] + p.tolist())
    # the last equation follows from the others
    found = linprog(gain.ravel(), A_eq=sums.reshape(count + size, -1)[:-1], b_eq=totals[:-1], options=TOLERANCE)
    return -found.fun


def inside(q, n, scheme):
    """Q(H) for every subset H of the vocabulary."""
    drafts = [(set(tokens), chance) for tokens, chance in draft_distribution(q, n, scheme) if chance > 0]
    return {
        subset: sum(chance for tokens, chance in drafts if tokens <= set(subset))
        for size in range(len(q) + 1)
        for subset in itertools.combinations(range(len(q)), size)
    }


def by_subsets(p, q, n, scheme):
    return 1 + min(float(p[list(h)].sum()) - chance for h, chance in inside(q, n, scheme).items())


def prefix_gap(p, q, k, scheme):
    """The tokens of one row in order, and P(H) - Q(H) of every prefix H; the best set is among these."""
    first = k - 1 if scheme == "greedy" else 0  # tokens that are drafted in any case come first
    certain, distribution = acceptance._last_draft(q, k) if first else (q.new_zeros(0, dtype=torch.long), q)
    ratio = (distribution / p).nan_to_num(nan=0.0).index_fill(0, certain, torch.inf)
    order = ratio.argsort(descending=True, stable=True)
    p, distribution = (torch.cat([row.new_zeros(1), row[order].cumsum(0)]) for row in (p, distribution))
    if scheme == "without" and k > 1:
        chance = chance_inside(q[order], k)
    else:
        chance = distribution if scheme == "greedy" else distribution**k
        chance[:first] = 0
    return order, p - chance


def chance_inside(q, k):
    """The chance (vocabulary + 1,) that k drafts without replacement lie in each prefix of one row."""
    outside = torch.cat([q.flip(0).cumsum(0).flip(0), q.new_zeros(1)])
    open_ = outside > 0  # beyond it every draft is inside
    times = acceptance._nodes(float(outside[open_][-1]), k).to(q)
    size = int(open_.sum()) - 1
    distributions = acceptance._running(torch.ones_like(times)[None], acceptance._pieces(q[:size], 1, times, k), k)
    chance = torch.ones_like(outside)
    chance[0] = 0
    chance[1 : size + 1] = acceptance._chance(distributions, outside[1 : size + 1], times)
    return chance


# --- the ceiling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SAMPLINGS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_ceiling_is_the_linear_program_and_the_best_subset(scheme, n):
    for seed in range(10):
        p, q = random_pair(seed, 3 + seed % 2)
        if drafts_exist(q, n, scheme):
            found = ceiling(p, q, n, scheme)
            assert found == pytest.approx(by_linear_program(p, q, n, scheme), abs=1e-9), seed
            assert found == pytest.approx(by_subsets(p, q, n, scheme), abs=1e-9), seed


@pytest.mark.parametrize("n", [2, 3, 4])
def test_without_replacement_is_the_best_subset_of_more_tokens(n):
    for seed in range(6):
        p, q = random_pair(seed, 6)
        if drafts_exist(q, n, "without"):
            assert ceiling(p, q, n, "without") == pytest.approx(by_subsets(p, q, n, "without"), abs=1e-9)


@pytest.mark.parametrize("scheme", SAMPLINGS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_gap_along_the_prefixes(scheme, n):
    for seed in range(4):
        p, q = random_pair(seed, 5)
        order, gap = prefix_gap(p, q, n, scheme)
        chance = inside(q, n, scheme)
        for size in range(6):
            prefix = order[:size].tolist()
            assert gap[size].item() == pytest.approx(float(p[prefix].sum()) - chance[tuple(sorted(prefix))], abs=1e-9)
        assert 1 + gap.min().item() == pytest.approx(ceiling(p, q, n, scheme), abs=1e-9)


def test_the_gap_of_a_large_vocabulary():
    p, q = zipf_pair(3000, 1.0, 0)
    for scheme in SAMPLINGS:
        _, gap = prefix_gap(p, q, 4, scheme)
        assert 1 + gap.min().item() == pytest.approx(ceiling(p, q, 4, scheme), abs=1e-9)


def test_worked_values():
    for (p, q), n, values in ((THREE, 2, (0.76, 0.885714, 0.8)), (FOUR, 2, (0.79, 0.834524, 0.766667))):
        for scheme, value in zip(SAMPLINGS, values):
            assert ceiling(p, q, n, scheme) == pytest.approx(value, abs=1e-6)
    for scheme, value in zip(SAMPLINGS, (0.871, 1.0, 0.933333)):
        assert ceiling(*FOUR, 3, scheme) == pytest.approx(value, abs=1e-6)
    assert ceiling(*THREE, 3, "with") == pytest.approx(0.888)
    p, q = THREE  # the minimizing set without replacement has the tokens 1 and 2
    chances = {h: float(p[list(h)].sum()) - c for h, c in inside(q, 2, "without").items()}
    assert min(chances, key=chances.get) == (1, 2)


def test_a_noisy_zipf_pair_has_the_usual_order():
    """Without above with; greedy behind on a flat draft; K-SEQ below its ceiling and above recursive rejection."""
    generator = torch.Generator().manual_seed(0)
    logits = -torch.arange(1, 1001, dtype=torch.float64).log()
    p, q = (logits + 0.7 * torch.randn(2, 1000, generator=generator, dtype=torch.float64)).softmax(-1)
    found = {scheme: ceiling(p, q, 4, scheme) for scheme in SAMPLINGS}
    reached = {name: float(verifier_acceptance(p, q, 4, name)) for name in ("kseq", "rrs")}
    assert found["without"] > found["with"] > max(found["greedy"], reached["kseq"])
    assert reached["kseq"] > reached["rrs"]


@pytest.mark.parametrize("scheme", SAMPLINGS)
def test_one_draft_and_equal_rows(scheme):
    for seed in range(10):
        p, q = random_pair(seed, 7)
        assert ceiling(p, q, 1, scheme) == pytest.approx(float(torch.minimum(p, q).sum()), abs=1e-12)
        for n in (1, 2, 3):
            assert ceiling(p, p, n, scheme) == pytest.approx(1, abs=1e-12)


def test_more_drafts_raise_the_ceiling_and_distinct_ones_more():
    for seed in range(20):
        p, q = random_pair(seed, 12)
        for scheme in ("with", "without"):
            rates = [ceiling(p, q, n, scheme) for n in range(1, 7)]
            assert all(b >= a - 1e-9 for a, b in itertools.pairwise(rates))
        assert all(ceiling(p, q, n, "without") >= ceiling(p, q, n, "with") - 1e-9 for n in range(1, 7))


@pytest.mark.parametrize("scheme", SAMPLINGS)
def test_the_order_of_the_vocabulary_does_not_matter(scheme):
    p, q = random_pair(2, 30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert ceiling(p, q, 3, scheme) == pytest.approx(ceiling(p[order], q[order], 3, scheme), abs=1e-9)


def test_tokens_that_only_one_side_has():
    """Target tokens that are never drafted are lost; draft tokens that the target lacks come first in the order."""
    p, q = row(0.5, 0.5, 0, 0, 0), row(0, 0.25, 0.25, 0.25, 0.25)
    for scheme in SAMPLINGS:
        assert ceiling(p, q, 3, scheme) == pytest.approx(by_subsets(p, q, 3, scheme), abs=1e-9)
    assert ceiling(row(1, 0, 0), row(0, 0.5, 0.5), 2, "without") == pytest.approx(0)
    assert ceiling(row(0, 1, 0), row(0.5, 0.25, 0.25), 3, "without") == pytest.approx(1)


@pytest.mark.parametrize("scheme", SAMPLINGS)
def test_many_rows_are_those_of_each(scheme):
    p, q = torch.randn(2, 2, 3, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    together = optimal_acceptance(p, q, 3, scheme)
    assert together.shape == (2, 3)
    for i, j in itertools.product(range(2), range(3)):
        assert float(together[i, j]) == pytest.approx(ceiling(p[i, j], q[i, j], 3, scheme), abs=1e-12)


# --- without replacement: what the fast way rests on ---------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_chance_inside_is_convex_and_bounded(n):
    """Gains per unit of q grow with the set, whatever the order; and the bounds from above and below hold."""
    for seed in (1, 2, 5, 7):
        _, q = random_pair(seed, 6)
        chances = inside(q, n, "without")
        for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 7):
            prefixes = [tuple(sorted(order[:i])) for i in range(7)]
            steps = [
                (chances[b] - chances[a]) / float(q[x]) for a, b, x in zip(prefixes, prefixes[1:], order) if q[x] > 0
            ]
            assert all(b >= a - 1e-9 for a, b in itertools.pairwise(steps))
            exact = torch.tensor([chances[h] for h in prefixes])
            sums = torch.tensor([float(q[list(h)].sum()) for h in prefixes], dtype=torch.float64)
            assert bool((exact <= sums**n + 1e-12).all())
            assert bool((exact >= acceptance._least_chance(q, 1 - sums, n) - 1e-9).all())


def closed_form_for_two(p, q):
    """1 + min over prefixes, with Q(H) = q(H) A(H) - B(H)."""
    p, q = acceptance._by_ratio(p, q)
    chances = q.cumsum(0) * (q / (1 - q)).cumsum(0) - (q**2 / (1 - q)).cumsum(0)
    return 1 + min(0.0, float((p.cumsum(0) - chances).min()))


def by_fine_quadrature(p, q, n, nodes=2400):
    """The exponential race token by token, on a trapezoid grid that is much finer than needed."""
    p, q = (x.numpy() for x in acceptance._by_ratio(p, q))
    z = np.linspace(-30, 45, nodes)
    t, width = np.exp(z), z[1] - z[0]
    distribution = np.zeros((n, nodes))
    distribution[0] = 1
    best, mass, outside = 0.0, 0.0, np.append(np.cumsum(q[::-1])[::-1], 0)
    for i, rate in enumerate(q):
        arrived = -np.expm1(-rate * t)
        distribution[1:] = distribution[1:] * (1 - arrived) + distribution[:-1] * arrived
        distribution[0] *= 1 - arrived
        mass, lam = mass + p[i], outside[i + 1]
        chance = 1.0 if lam < 1e-12 else width * (lam * t * np.exp(-lam * t) * (1 - distribution.sum(0))).sum()
        best = min(best, mass - chance)
    return 1 + best


def zipf_pair(size, noise, seed):
    generator = torch.Generator().manual_seed(seed)
    p = (torch.randn(size, generator=generator, dtype=torch.float64) * noise - torch.arange(1, size + 1).log()).softmax(
        -1
    )
    q = (p.log() + torch.randn(size, generator=generator, dtype=torch.float64) * noise).softmax(-1)
    return p, q


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_large_vocabularies_agree_with_the_closed_form_for_two_drafts(noise):
    for seed in range(3):
        p, q = zipf_pair(3000, noise, seed)
        assert ceiling(p, q, 2, "without") == pytest.approx(closed_form_for_two(p, q), abs=1e-9)


@pytest.mark.parametrize("n", [3, 4, 8])
@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_large_vocabularies_agree_with_a_fine_quadrature(n, noise):
    p, q = zipf_pair(700, noise, 5)
    assert ceiling(p, q, n, "without") == pytest.approx(by_fine_quadrature(p, q, n), abs=1e-9)


def test_how_the_prefixes_are_cut_does_not_matter(monkeypatch):
    p, q = zipf_pair(700, 1.0, 1)
    wanted = ceiling(p, q, 3, "without")
    monkeypatch.setattr(acceptance, "PIECES", 2)
    monkeypatch.setattr(acceptance, "BLOCK", 64)
    monkeypatch.setattr(acceptance, "HEAVY", 512)  # all tokens one by one
    assert ceiling(p, q, 3, "without") == pytest.approx(wanted, abs=1e-12)
    monkeypatch.setattr(
        acceptance, "_bounds", lambda mass, *rest: torch.full_like(rest[-1], -1.0)
    )  # nothing is dropped
    assert ceiling(p, q, 3, "without") == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4, 8])
@pytest.mark.parametrize("noise", [0.1, 1.0, 3.0])
def test_rare_tokens_may_be_taken_together(monkeypatch, n, noise):
    p, q = zipf_pair(2000, noise, 2)
    monkeypatch.setattr(acceptance, "PIECES", 4)
    monkeypatch.setattr(acceptance, "HEAVY", 512)
    wanted = ceiling(p, q, n, "without")
    monkeypatch.setattr(acceptance, "HEAVY", 4)
    assert ceiling(p, q, n, "without") == pytest.approx(wanted, abs=1e-11)
    flat = torch.full_like(q, 1 / 2000)  # no token comes before the others
    found = ceiling(p, flat, n, "without")
    monkeypatch.setattr(acceptance, "HEAVY", 512)
    assert found == pytest.approx(ceiling(p, flat, n, "without"), abs=1e-11)


@pytest.mark.parametrize("least", [1e-4, 1e-9, 1e-14])
def test_a_draft_that_is_nearly_certain(least):
    """The later drafts come from what is left, however little that is."""
    q = row(1 - 6 * least, 3 * least, 2 * least, least)
    for p in (row(0.1, 0.2, 0.3, 0.4), row(0.4, 0.1, 0.1, 0.4), row(0.7, 0.1, 0.15, 0.05)):
        for n in (2, 3):
            assert ceiling(p, q, n, "without") == pytest.approx(by_subsets(p, q, n, "without"), abs=1e-9)


def test_a_vocabulary_of_real_size():
    """With 49,152 tokens: within the bounds, and the closed form for two drafts."""
    p, q = zipf_pair(49152, 1.0, 0)
    assert ceiling(p, q, 2, "without") == pytest.approx(closed_form_for_two(p, q), abs=1e-9)
    found = ceiling(p, q, 4, "without")
    assert max(ceiling(p, q, 4, "with"), float(verifier_acceptance(p, q, 4, "kseq"))) <= found <= 1
    assert ceiling(p.float(), q.float(), 4, "without") == pytest.approx(found, abs=1e-6)


# --- what verifiers reach ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_formula_is_the_enumerated_rate(name, n):
    for seed in range(8):
        p, q = random_pair(seed, 4)
        if drafts_exist(q, n, VERIFIERS[name].sampling):
            _, passed, drafted = enumerated(VERIFIERS[name], p, q, n)
            assert float(verifier_acceptance(p, q, n, name)) == pytest.approx(drafted, abs=1e-10)
            assert float(verifier_acceptance(p, q, n, name, explicit=True)) == pytest.approx(passed, abs=1e-10)


def test_worked_values_of_the_verifiers():
    for (p, q), n, values in (
        (THREE, 2, {"kseq": 0.708062, "rrs": 0.68, "rrs-without": 0.76, "greedy": 0.8}),
        (FOUR, 2, {"kseq": 0.75, "rrs": 0.72, "rrs-without": 0.764286, "naive": 0.35, "greedy": 0.766667}),
        (FOUR, 3, {"kseq": 0.793950, "rrs": 0.768, "rrs-without": 0.840298, "greedy": 0.933333}),
    ):
        for name, value in values.items():
            assert float(verifier_acceptance(p, q, n, name)) == pytest.approx(value, abs=1e-6), (name, n)
    p, q = FOUR  # the naive verifier on drafts without replacement
    naive = sum(chance * float(p[list(tokens)].sum()) for tokens, chance in draft_distribution(q, 2, "without"))
    assert naive == pytest.approx(0.419444, abs=1e-6)
    assert float(verifier_acceptance(p, q, 2, "naive", sampling="without")) == pytest.approx(naive, abs=1e-9)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_naive_verifier_by_enumeration(sampling, n):
    """For every way of drafting it: a draw of the target that happens to be drafted."""
    pairs = [random_pair(seed, 5) for seed in range(6)]
    pairs = [(p, q) for p, q in pairs if sampling == "with" or int((q > 0).sum()) >= n]
    for p, q in pairs:
        found = sum(
            chance * float(p[sorted(set(tokens))].sum()) for tokens, chance in draft_distribution(q, n, sampling)
        )
        assert float(verifier_acceptance(p, q, n, "naive", sampling=sampling)) == pytest.approx(found, abs=1e-8)
        assert found <= float(optimal_acceptance(p, q, n, sampling)) + 1e-8
    batch = torch.stack([p for p, _ in pairs[:2]]), torch.stack([q for _, q in pairs[:2]])
    single = [float(verifier_acceptance(p, q, n, "naive", sampling=sampling)) for p, q in pairs[:2]]
    assert verifier_acceptance(*batch, n, "naive", sampling=sampling).tolist() == pytest.approx(single)


def test_another_verifiers_sampling_is_refused():
    with pytest.raises(InputError, match="sampling='with' is not how 'rrs-without' draws"):
        verifier_acceptance(*FOUR, 2, "rrs-without", sampling="with")
    with pytest.raises(InputError, match="no sampling 'best'"):
        verifier_acceptance(*FOUR, 2, "naive", sampling="best")


def test_no_verifier_is_above_its_ceiling_and_one_is_at_it():
    for seed in range(20):
        p, q = random_pair(seed, 10)
        for n in (1, 2, 4):
            rates = {name: float(verifier_acceptance(p, q, n, name)) for name in SEVERAL}
            for name, rate in rates.items():
                assert rate <= ceiling(p, q, n, VERIFIERS[name].sampling) + 1e-9, name
            assert rates["naive"] <= rates["rrs"] + 1e-12 and rates["naive"] <= rates["kseq"] + 1e-12
            assert rates["greedy"] == pytest.approx(ceiling(p, q, n, "greedy"), abs=1e-12)
            assert rates["kseq"] >= (1 - (1 - 1 / n) ** n) * ceiling(p, q, n, "with") - 1e-12
            if n == 1:
                least = float(torch.minimum(p, q).sum())
                assert all(rates[name] == pytest.approx(least, abs=1e-12) for name in SEVERAL if name != "naive")
                assert float(verifier_acceptance(p, q, 1, "single")) == pytest.approx(least, abs=1e-12)


@pytest.mark.parametrize("name", SEVERAL)
def test_rates_of_many_rows(name):
    p, q = torch.randn(2, 2, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    together = verifier_acceptance(p, q, 3, name)
    for i, j in itertools.product(range(2), range(3)):
        assert float(together[i, j]) == pytest.approx(float(verifier_acceptance(p[i, j], q[i, j], 3, name)), abs=1e-13)


def test_random_paths_estimate_the_exact_rate():
    p, q = zipf_pair(40, 1.0, 3)
    exact = float(verifier_acceptance(p, q, 3, "rrs-without"))
    estimates = [
        float(verifier_acceptance(p, q, 3, "rrs-without", monte_carlo=200, generator=torch.Generator().manual_seed(s)))
        for s in range(20)
    ]
    assert np.std(estimates) > 0
    assert abs(np.mean(estimates) - exact) < 4 * np.std(estimates) / math.sqrt(20)
    equal = verifier_acceptance(p, p, 3, "rrs-without", monte_carlo=5)
    assert float(equal) == pytest.approx(1)


def test_the_report_has_ceilings_verifiers_and_gaps():
    p, q = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    rows = acceptance_report(p, q, n=(1, 2))
    assert len(rows) == 2 * (3 + 5)
    found = {(r.n, r.name, r.sampling): r for r in rows}
    best, kseq = found[2, "ceiling", "with"], found[2, "kseq", "with"]
    assert kseq.acceptance == pytest.approx(float(kseq_acceptance_probability(p, q, 2).mean()))
    assert kseq.gap == pytest.approx(best.acceptance - kseq.acceptance) and kseq.gap > 0 and best.gap == 0
    assert found[2, "greedy", "greedy"].gap == pytest.approx(0, abs=1e-12)
    assert 0 < kseq.error < 0.1 and not any(r.estimated for r in rows)
    estimated = acceptance_report(p, q, n=(3,), verifiers=["rrs-without"], monte_carlo=10)
    assert [r.estimated for r in estimated] == [False, False, False, True]
    (single,) = acceptance_report(p[0], q[0], n=(1,), verifiers=["single"])[-1:]
    assert math.isnan(single.error)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [optimal_acceptance, lambda p, q, n, scheme: verifier_acceptance(p, q, n, "kseq")])
def test_bad_rows_are_refused(use):
    p, q = THREE
    for a, b, message in (
        (p, row(0.5, 0.5), "draft vocabulary 2 != target 3"),
        (p.expand(2, -1), q, "differ"),
        (p * 0.9, q, "target probabilities is off"),
        (p, q * float("nan"), "draft probabilities is off"),
        (row(1.5, -0.5, 0), q, "least entry -0.5"),
    ):
        with pytest.raises(InputError, match=message):
            use(a, b, 2, "with")
    with pytest.raises(InputError, match="n=0 drafts is not allowed"):
        use(p, q, 0, "with")


def test_drafts_that_cannot_be_drawn_are_refused():
    p = row(0.2, 0.2, 0.2, 0.2, 0.2)
    q = row(0.5, 0.25, 0.25, 0, 0)
    message = "cannot draw 5 distinct tokens from a draft with 3 non-zero probabilities"
    for scheme, name in (("without", "rrs-without"), ("greedy", "greedy")):
        with pytest.raises(InputError, match=message):
            optimal_acceptance(p, q, 5, scheme)
        with pytest.raises(InputError, match=message):
            verifier_acceptance(p, q, 5, name)
    assert ceiling(p, q, 5, "with") == pytest.approx(0.6)  # the target has the other 0.4 where no draft is


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="no sampling 'gumbel'; use one of with, without, greedy"):
        optimal_acceptance(*THREE, 2, "gumbel")
    with pytest.raises(InputError, match="no verifier 'best'; use one of single, naive"):
        verifier_acceptance(*THREE, 2, "best")
    with pytest.raises(InputError, match="'single' takes one draft, not 2"):
        verifier_acceptance(*THREE, 2, "single")


def test_an_exact_recursion_that_is_too_large_is_refused():
    p, q = zipf_pair(5000, 1.0, 0)
    with pytest.raises(InputError, match="use monte_carlo=1000"):
        verifier_acceptance(p, q, 3, "rrs-without")
    rate = float(verifier_acceptance(p, q, 3, "rrs-without", monte_carlo=20))
    assert float(torch.minimum(p, q).sum()) < rate < ceiling(p, q, 3, "without")
    for name, paths in (("kseq", 10), ("rrs-without", 0)):
        with pytest.raises(InputError, match="a number of paths >= 1 for 'rrs-without'"):
            verifier_acceptance(*THREE, 2, name, monte_carlo=paths)


# --- the experiment --------------------------------------------------------------------------------------------------


def test_the_experiment_measures_what_the_formulas_say(llama, tokenizer, monkeypatch):
    from tokenry.decode import OptimalMDSD
    from tokenry.evidence import optimal_mdsd
    from tokenry.measure import claims
    from tokenry.measure.compare import compare

    monkeypatch.setattr(claims, "UNITS", 2)  # so that few texts decide
    monkeypatch.setattr(optimal_mdsd, "NEW_TOKENS", 6)
    monkeypatch.setattr(optimal_mdsd, "PATHS", 20)
    method = OptimalMDSD(drafter="early-exit", exit_layers=2)
    experiment = optimal_mdsd.build(llama, tokenizer, samples=2, method=method)
    comparison = compare(experiment)
    assert [s.role for s in experiment.arms] == ["plain", "control", *["method"] * 4, *["control"] * 4]
    for name in optimal_mdsd.SEVERAL_DRAFTS:
        mean = {subject: comparison.mean(subject, name) for subject in comparison.arms}
        assert mean["greedy"] == pytest.approx(mean["ceiling, greedy"]) and mean["any draft"] == 1
        assert mean["single"] < mean["kseq"] < mean["ceiling, with"] < mean["ceiling, without"]
        assert math.isnan(comparison.mean("ceiling, with", f"measured {name}"))
    hits = optimal_mdsd.pooled(comparison, "greedy", "accepted", "T=1 n=4")
    assert len(hits) == 12 and set(hits) <= {0, 1}
    findings = experiment.findings(comparison)
    assert findings[1].outcome == "fails" and [f.main for f in findings] == [True, *[False] * 4]
    assert "without - ceiling, with: +0.00" in findings[1].numbers and all(f.check for f in findings)
    for verifier in optimal_mdsd.SEVERAL:
        top = optimal_mdsd.ceiling(VERIFIERS[verifier].sampling)
        for name in optimal_mdsd.ALL:
            rate, most = (optimal_mdsd.pooled(comparison, arm, "expected", name) for arm in (verifier, top))
            assert np.all(rate <= most + 1e-8)
    assert all(abs(gap.interval.mean) < 1e-9 for gap in optimal_mdsd.below_ceiling(comparison, "greedy"))
    assert "20 random paths" in experiment.notes


def test_distances_in_standard_errors():
    from tokenry.evidence.optimal_mdsd import errors_off

    assert errors_off(np.ones(4), np.full(4, 0.5)) == 2
    assert errors_off(np.ones(4), np.ones(4)) == 0 and errors_off(np.zeros(4), np.ones(4)) == math.inf


def test_the_method_is_in_the_catalogue():
    from tokenry import catalog

    method = catalog.load("optimal-mdsd")
    assert method().verifier == "greedy" and method().num_drafts == 4 and method.stage == "decode"
    assert catalog.find("highest acceptance rate of drafts")[0].slug == "optimal-mdsd"
