"""ARISE: closed forms, brute force, invariants, the sampler, refusals, the command line."""

import itertools
import json
import logging
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from click.testing import CliRunner

from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.judge import (
    AdaptiveSampler,
    Arise,
    ResultRow,
    Results,
    allocate_budget,
    arise_score,
    bootstrap_ci,
    negative_scaling,
)
from tokenry.judge.arise import permuted_scores, slope
from tokenry.judge.scaling.sampling import variation


def drawn(questions=40, levels=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4, (questions, levels)) / 3, rng.uniform(10, 1000, (questions, levels))


def one(accuracies, tokens):
    return arise_score([accuracies], [tokens]).score


def by_definition(accuracies, tokens):
    total = 0.0
    for j in range(1, len(accuracies)):
        d = accuracies[j] - accuracies[j - 1]
        total += d * (tokens[j - 1] / tokens[j]) ** (int(d > 0) - int(d < 0))
    return total


# --- the score -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0.5, 1, 2, 10])
def test_one_gain_is_worth_one_over_the_ratio_and_one_loss_minus_the_ratio(k):
    assert one([0, 1], [10, 10 * k]) == pytest.approx(1 / k)
    assert one([1, 0], [10, 10 * k]) == pytest.approx(-k)


def test_closed_forms():
    assert one([1, 0, 1], [5, 10, 20]) == pytest.approx(-2 + 1 / 2)
    assert one([0.4, 0.4, 0.4], [5, 1000, 3]) == 0
    assert one([0, 0.5, 0.5, 1], [1, 2, 50, 100]) == pytest.approx(0.5 / 2 + 0.5 / 2)


def test_every_question_scores_as_defined():
    a, t = drawn()
    found = arise_score(a, t)
    assert found.per_sample == pytest.approx([by_definition(*row) for row in zip(a, t)])
    assert found.score == pytest.approx(np.mean(found.per_sample)) and found.std == pytest.approx(
        math.sqrt(np.mean((found.per_sample - found.score) ** 2))
    )


def test_scaling_the_tokens_of_a_question_changes_nothing():
    a, t = drawn()
    factors = np.random.default_rng(1).uniform(0.1, 9, (len(a), 1))
    assert arise_score(a, t * factors).per_sample == pytest.approx(arise_score(a, t).per_sample)


def test_two_levels_in_the_other_order_score_the_opposite():
    """With both columns swapped a gain of 1/k becomes a loss at 1/k the tokens: -1/k."""
    a, t = drawn(levels=2)
    swapped = arise_score(a[:, ::-1], t[:, ::-1]).per_sample
    assert swapped == pytest.approx(-arise_score(a, t).per_sample)


def test_counts_of_steps_and_questions():
    found = arise_score([[1, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0.5, 1]], np.tile([1, 2, 3], (4, 1)))
    assert (found.improved, found.degraded, found.always_right, found.always_wrong) == (3, 1, 1, 1)


def test_one_expensive_loss_is_most_of_the_mean_but_not_of_median_and_clipped():
    found = arise_score([[1, 0], [0, 1], [0, 1]], [[10, 100], [10, 20], [10, 20]])
    assert found.score == pytest.approx(-3) and found.median == pytest.approx(0.5)
    assert found.clipped == pytest.approx(0)


# --- null value and interval -----------------------------------------------------------------------------------------


def test_the_null_value_is_the_mean_over_all_orders():
    a, t = [0, 1 / 3, 1], [10, 25, 80]
    orders = [by_definition(order, t) for order in itertools.permutations(a)]
    found = permuted_scores(np.array([a]), np.array([t], float), 4000)
    assert set(found.round(9)) == {round(x, 9) for x in orders}
    assert found.mean() == pytest.approx(np.mean(orders), abs=4 * np.std(orders) / math.sqrt(4000))


def test_the_null_value_of_two_levels_has_a_closed_form():
    found = permuted_scores(np.tile([0.0, 1.0], (5000, 1)), np.tile([1.0, 2.0], (5000, 1)), 20).mean()
    assert found == pytest.approx((1 / 2 - 2) / 2, abs=0.03)


def test_without_any_change_null_and_interval_are_points():
    report = Arise().compute(np.ones((5, 3)), np.tile([1, 2, 4], (5, 1)))
    assert (report.low, report.result.score, report.high, report.null_value, report.p_value) == (0, 0, 0, 0, 1)


def test_the_interval_is_the_normal_one_for_many_questions():
    found = arise_score(*drawn(2000))
    low, high = bootstrap_ci(found, 2000)
    half = 1.96 * found.std / math.sqrt(2000)
    assert (low, high) == pytest.approx((found.score - half, found.score + half), abs=0.1 * half)
    assert bootstrap_ci(found, 50, seed=3) == bootstrap_ci(found, 50, seed=3)


def test_the_slope_hides_what_the_score_shows():
    """Two of five questions are lost at four times the tokens, three are won: the mean rises."""
    a, t = [[1, 0]] * 2 + [[0, 1]] * 3, np.tile([100, 400], (5, 1))
    assert slope(a, t) == pytest.approx(0.2 / 300) and arise_score(a, t).score == pytest.approx((-8 + 0.75) / 5)
    assert slope(a, t[:, ::-1]) == 0


def test_every_loss_is_reported():
    found = negative_scaling([[1, 0.5, 1], [0, 1, 0]], [[10, 14, 20], [10, 20, 60]])
    assert [(x.question, x.level, x.drop, x.extra_tokens, x.severe) for x in found] == [
        (0, 1, 0.5, 4, False),
        (1, 2, 1, 40, True),
    ]
    assert [x.penalty for x in found] == pytest.approx([-1.4, -3])
    assert not negative_scaling([[1, 0]], [[10, 15]])[0].severe  # not above 1.5


# --- the sampler -----------------------------------------------------------------------------------------------------


def test_variation_is_the_population_deviation_over_the_mean():
    assert variation([0, 1]) == pytest.approx(1) and variation([3]) == 0 and variation([0, 0, 0]) == 0


def test_constant_results_stop_early_and_alternating_ones_go_on():
    assert len(AdaptiveSampler().run(lambda: (1, 50)).runs) == 3
    assert len(AdaptiveSampler().run(lambda: (0, 50)).runs) == 3
    turns = itertools.cycle([0, 1])
    cell = AdaptiveSampler().run(lambda: (next(turns), 50))
    assert len(cell.runs) == 10 and cell.accuracy == 0.5 and cell.tokens == 50


def test_the_sampler_stops_as_soon_as_the_rule_says():
    given = [(1, 10), (0, 10), (1, 10), (1, 10), (1, 10), (1, 10), (1, 10), (1, 10)]
    cell = AdaptiveSampler().run(iter(given).__next__)
    wanted = next(m for m in range(3, 11) if variation([a for a, _ in given[:m]]) <= 0.5)
    assert len(cell.runs) == wanted and cell.accuracy == pytest.approx((wanted - 1) / wanted)


def test_a_final_batch_alone_is_averaged():
    given = [(0, 10)] * 3 + [(1, 30)] * 2
    cell = AdaptiveSampler(final=2).run(iter(given).__next__)
    assert (cell.accuracy, cell.tokens, len(cell.runs)) == (1, 30, 5)


def test_a_budget_is_shared_by_variation():
    assert allocate_budget([1, 3], 10) == [4, 6]
    assert allocate_budget([0, 9], 30) == [3, 10]
    assert allocate_budget([1, 1, 1], 4) == [3, 3, 3] and allocate_budget([0, 0], 20) == [3, 3]


@pytest.mark.parametrize("seed", range(20))
def test_a_budget_is_never_exceeded(seed):
    rng = np.random.default_rng(seed)
    cvs, total = rng.exponential(size=12), int(rng.integers(36, 200))
    runs = allocate_budget(cvs, total)
    assert sum(runs) <= total and min(runs) >= 3 and max(runs) <= 10


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "tokens", "said"),
    [
        ([[0, 1]], [[1, 2, 3]], r"shape \(1, 2\), tokens \(1, 3\)"),
        ([[0, 1.1]], [[1, 2]], "accuracy=1.1 of question 1 at level 2"),
        ([[0, 1], [-0.5, 1]], [[1, 2], [1, 2]], "accuracy=-0.5 of question 2"),
        ([[0, math.nan]], [[1, 2]], "accuracy=nan"),
        ([[0, 1]], [[1, 0]], "tokens=0"),
        ([[0, 1]], [[1, -3]], "tokens=-3"),
        ([[0, 1]], [[1, math.inf]], "tokens=inf"),
        ([[0, 1]], [[math.nan, 1]], "tokens=nan"),
        ([[1]], [[5]], "at least 2 levels"),
        ([0, 1], [5, 6], "at least 2 levels"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "at least 2 levels"),
        ([[0, 1], [1]], [[1, 2], [1]], "no table of numbers"),
        ([["a", "b"]], [[1, 2]], "no table of numbers"),
    ],
)
def test_bad_tables_are_refused(accuracies, tokens, said):
    for judged in (arise_score, Arise().compute, negative_scaling, slope):
        with pytest.raises(InputError, match=said):
            judged(accuracies, tokens)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"m_min": 0}, "m_min=0"),
        ({"m_min": 5, "m_max": 4}, "m_min=5 is above m_max=4"),
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"threshold": math.nan}, "threshold=nan"),
        ({"epsilon": 0}, "epsilon=0"),
        ({"final": -1}, "final"),
    ],
)
def test_bad_samplers_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        AdaptiveSampler(**options)


@pytest.mark.parametrize("run", [(2, 5), (-1, 5), (math.nan, 5), (1, 0), (1, math.inf)])
def test_runs_that_cannot_be_are_refused(run):
    with pytest.raises(InputError, match="is not allowed"):
        AdaptiveSampler().run(lambda: run)


def test_bad_budgets_and_options_are_refused():
    for cvs, total in ([], 10), ([-1], 10), ([math.nan], 10), ([1], 0):
        with pytest.raises(InputError):
            allocate_budget(cvs, total)
    for options in ({"severe_ratio": 1}, {"resamples": 0}, {"permutations": 0}, {"seed": -1}):
        with pytest.raises(InputError):
            Arise(**options)


def rows_of(*rows):
    return [ResultRow(question=q, level=v, accuracy=a, tokens=t) for q, v, a, t in rows]


def test_rows_become_a_table():
    found = Results.from_rows(
        rows_of(("x", 4, 1, 30), ("x", 2, 0, 10), ("x", 2, 1, 20), ("y", 2, 0, 7), ("y", 4, 0, 9))
    )
    assert found.levels == [2, 4] and found.questions == ["x", "y"]
    assert found.accuracies.tolist() == [[0.5, 1], [0, 0]] and found.tokens.tolist() == [[15, 30], [7, 9]]
    named = Results.from_rows(rows_of(("x", "low", 0, 1), ("x", "high", 1, 2)))
    assert named.levels == ["low", "high"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("x", 1, 0, 1), ("x", 2, 0, 1), ("y", 1, 0, 1)], "'y' has no row at the level 2"),
        ([("x", 1, 0, 1), ("x", "high", 0, 1)], "give one kind"),
        ([("x", 1, 0, 1), ("y", 1, 0, 1)], "there are 1 levels"),
        ([], "there are 0 levels"),
    ],
)
def test_rows_that_are_no_table_are_refused(rows, said):
    with pytest.raises(InputError, match=said):
        Results.from_rows(rows_of(*rows))


@pytest.mark.parametrize(
    ("questions", "levels", "said"),
    [
        ("x", [1, 2], "questions are the text 'x'"),
        (["x"], "ab", "levels are the text"),
        (["x", "y"], [1, 2], "for 2 q"),
    ],
)
def test_names_that_do_not_fit_the_table_are_refused(questions, levels, said):
    with pytest.raises(InputError, match=said):
        Results([[0, 1]], [[1, 2]], questions, levels)


def test_tokens_that_do_not_grow_are_said_on_the_log(caplog):
    with caplog.at_level(logging.WARNING):
        arise_score([[0, 1]], [[20, 10]])
    assert "mean tokens do not grow with the level: 20, 10" in caplog.text


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(tmp_path):
    a, t = drawn(6, 3)
    path = tmp_path / "results.jsonl"
    rows = [
        {"question": f"<{i}> & co", "level": j, "accuracy": a[i, j], "tokens": t[i, j]}
        for i in range(6)
        for j in range(3)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def invoke(*args):
    return CliRunner().invoke(main, ["judge", "--method", "arise", *map(str, args)])


def test_the_verb_prints_what_the_method_declares_and_draws_every_question(lines, tmp_path):
    picture = tmp_path / "picture.svg"
    done = invoke(lines, "--json", "--report", picture)
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    report = Arise().compute(*drawn(6, 3))
    assert answer["score"] == pytest.approx(report.result.score) and len(answer["losses"]) == report.result.degraded
    assert Arise.output.model_validate(answer).model_dump(mode="json") == answer
    drawing = ET.parse(picture).getroot()
    assert len(drawing.findall(".//{*}polyline")) == 2 * (6 + 1)
    assert invoke(lines, "--report", picture).exit_code == 0  # its own picture may be replaced
    assert "ARISE" in invoke(lines).stdout


def test_the_verb_refuses_what_it_would_not_look_at(lines, tmp_path):
    for option in (["--raw"], ["--trace"], ["--pairs", tmp_path / "p"], ["--model", "x"]):
        assert "would have no effect with --method arise" in invoke(lines, *option).stderr
    assert invoke(lines, "--report", lines).exit_code != 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question": "x", "level": 1, "accuracy": 2, "tokens": 5}', "field 'accuracy' is 2"),
        ('{"question": "x", "level": 1, "accuracy": 1, "tokens": 0}', "field 'tokens' is 0"),
        ('{"question": "x", "level": 1, "accuracy": NaN, "tokens": 1}', "accuracy"),
        ('{"question": "x", "level": true, "accuracy": 1, "tokens": 1}', "level"),
        ('{"question": "x", "level": 1, "accuracy": "1", "tokens": 1}', "accuracy"),
        ('{"question": "x", "accuracy": 1, "tokens": 1}', "field 'level' is missing"),
        ("[]", "not an object"),
        ("", "holds no results"),
    ],
)
def test_broken_lines_are_refused_by_name(tmp_path, line, said):
    path = tmp_path / "r.jsonl"
    path.write_text(line)
    done = invoke(path)
    assert done.exit_code != 0 and said in done.stderr
