"""Findings: closed forms of every check at its three outcomes, generated texts, verdicts, contrasts and sweeps."""

import importlib
import math
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from support.comparing import Roots
from support.comparing import experiment as roots

from tokenry import catalog
from tokenry.decode import CreditDecoding
from tokenry.measure.claims import (
    Check,
    Contrast,
    Finding,
    above,
    all_of,
    any_of,
    at_least,
    at_most,
    below,
    describe,
    exactly,
    loses_at_most,
    share,
    verdict,
    within,
)
from tokenry.measure.compare import Comparison, beats, compare
from tokenry.measure.experiment import Design, Experiment, Run, experiment, sweep
from tokenry.measure.ledger import evidence, measured, measured_on, verdict_in
from tokenry.measure.statistics import Interval, bootstrap_statistic, paired_bootstrap
from tokenry.measure.task import Arm, Metric, Outcome, Sample, Statistic
from tokenry.zoo.recipes import RECIPES


def number(low, mean, high, form=".2f"):
    return Contrast(Interval(mean, low, high, 50), "x", form)


NOTHING = Contrast(Interval(math.nan, math.nan, math.nan, 0), "x")
ONE = Contrast(Interval(0.4, -math.inf, math.inf, 1), "x")


# --- checks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "x", "outcome"),
    [
        (above, (0.51, 0.6, 0.7), "holds"),
        (above, (0.3, 0.6, 0.7), "undecided"),  # the point is above, the interval is not
        (above, (0.3, 0.4, 0.49), "fails"),
        (above, (0.5, 0.5, 0.5), "undecided"),  # all samples say the same, which is not what is asked
        (below, (0.3, 0.4, 0.49), "holds"),
        (below, (0.3, 0.4, 0.7), "undecided"),
        (below, (0.51, 0.6, 0.7), "fails"),
        (at_least, (0.5, 0.6, 0.7), "holds"),
        (at_least, (0.49, 0.6, 0.7), "undecided"),
        (at_least, (0.3, 0.4, 0.49), "fails"),
        (at_most, (0.3, 0.4, 0.5), "holds"),
        (at_most, (0.3, 0.4, 0.51), "undecided"),
        (at_most, (0.51, 0.6, 0.7), "fails"),
    ],
)
def test_a_bound_is_decided_by_the_interval(check, x, outcome):
    found = check(number(*x), 0.5)
    assert found.outcome == outcome and found.text.endswith(f"0.5: {outcome})")
    assert found.number.interval.mean == x[1]


@pytest.mark.parametrize(
    ("x", "both", "loss"),
    [
        ((-0.005, 0.0, 0.005), "holds", "holds"),
        ((-0.02, -0.01, 0.0), "holds", "holds"),  # at the margin, and at twice the margin
        ((-0.021, -0.01, 0.0), "undecided", "undecided"),  # the interval is beyond twice the margin
        ((-0.015, -0.011, 0.0), "undecided", "undecided"),  # the point is beyond the margin
        ((-0.03, -0.02, -0.011), "fails", "fails"),
        ((-0.01, 0.005, 0.021), "undecided", "holds"),
        ((0.02, 0.03, 0.04), "fails", "holds"),  # a gain is welcome to one of them
        ((-0.5, 0.0, 0.5), "undecided", "undecided"),  # that 0 is inside says nothing
    ],
)
def test_a_margin_asks_for_the_point_and_for_twice_of_the_interval(x, both, loss):
    assert within(number(*x), 0.01).outcome == both
    assert loses_at_most(number(*x), 0.01).outcome == loss


@pytest.mark.parametrize("check", [above, below, at_least, at_most, within, loses_at_most])
@pytest.mark.parametrize("x", [NOTHING, ONE])
def test_nothing_measured_and_one_sample_decide_nothing(check, x):
    assert check(x, 0.5).outcome == "undecided"


def test_exact_numbers_are_never_undecided():
    for check, bound, outcome in (
        (above, 3, "fails"),
        (above, 2, "holds"),
        (at_most, 3, "holds"),
        (below, 3, "fails"),
        (within, 2, "fails"),
    ):
        assert check(exactly(3, "x"), bound).outcome == outcome
    assert str(exactly(3, "texts that differ")) == "texts that differ: 3"


@pytest.mark.parametrize(("n", "outcome"), [(2, "undecided"), (5, "undecided"), (6, "holds")])
def test_a_handful_of_samples_decides_nothing(n, outcome):
    """Their bootstrap interval ends at the lowest and highest of them, and leaves out far more than 5 %."""
    found = above(Contrast(paired_bootstrap(np.linspace(1, 2, n), np.zeros(n)), "x"), 0.5)
    assert found.outcome == outcome and (f"undecided, {n} samples)" in found.text) == (n < 6)


def test_the_text_is_made_from_the_check():
    assert above(number(0.1, 0.2, 0.3), 0).text == "x: 0.20 [0.10, 0.30] (above 0: holds)"
    assert at_least(number(0.1, 0.2, 0.3, ".1%"), 0.15).text == "x: 20.0% [10.0%, 30.0%] (at least 15%: undecided)"
    assert loses_at_most(number(-0.2, -0.1, 0, "+.2f"), 0.01).text == (
        "x: -0.10 [-0.20, +0.00] (loses at most 0.01: undecided)"
    )


def made(outcome):
    return Check(outcome, outcome[0], Contrast(Interval(0, 0, 0, 20), outcome))


@pytest.mark.parametrize(
    ("outcomes", "every", "one"),
    [
        (["holds", "holds"], "holds", "holds"),
        (["holds", "undecided"], "undecided", "holds"),
        (["undecided", "fails"], "fails", "undecided"),
        (["holds", "fails"], "fails", "holds"),
        (["fails", "fails"], "fails", "fails"),
    ],
)
def test_checks_together(outcomes, every, one):
    for order in permutations(map(made, outcomes)):
        assert all_of(*order).outcome == all_of(*order).number.what == every
        assert any_of(*order).outcome == any_of(*order).number.what == one
    assert all_of(*map(made, outcomes)).text == "; ".join(o[0] for o in outcomes)
    assert any_of(*map(made, outcomes)).text == " or ".join(o[0] for o in outcomes)
    assert any_of(all_of(made("holds"), made("fails")), made("fails")).text == "(h; f) or f"


def test_a_share_has_its_interval_over_what_was_counted():
    right = np.array([1, 1, 0, 1, 1, 0, 1, 1, 1, 1], float)
    found = share(right, "right")
    assert found.interval == bootstrap_statistic(lambda pick: right[pick].mean(), 10) and found.shown.startswith(
        "80.0% ["
    )


# --- the verdict ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "others", "expected"),
    [
        ("holds", ["holds", "holds"], "reproduced"),
        ("holds", [], "reproduced"),
        ("holds", ["fails", "holds"], "partly"),
        ("holds", ["undecided"], "partly"),
        ("fails", ["holds", "holds"], "not reproduced"),
        ("undecided", ["holds", "fails"], "undecided"),
        ("undecided", [], "undecided"),
    ],
)
def test_the_verdict_does_not_depend_on_the_order(main, others, expected):
    findings = [
        Finding("claim", made(main), main=True),
        *(Finding("more", made(outcome)) for outcome in others),
        describe("a curve", "5: 0.3"),
    ]
    for order in permutations(findings):
        assert verdict(order) == expected


def test_there_is_one_main_finding_that_decides():
    for findings in ([], [describe("a", "b")], [Finding("a", made("holds"))], [Finding("a", made("holds"), True)] * 2):
        with pytest.raises(ValueError, match="one main finding"):
            verdict(findings)


def test_a_description_is_not_counted():
    told = describe("where it saves", "level 1: 40 of 60")
    assert told.outcome == "described" and not told.holds and told.numbers == "level 1: 40 of 60"
    assert Finding("a", above(number(1, 2, 3), 0), note="more").numbers == "x: 2.00 [1.00, 3.00] (above 0: holds); more"


# --- contrasts -----------------------------------------------------------------------------------------------------


class Made:
    slug, stage = "made", "decode"
    metrics = (Metric("right", "higher", "share"), Metric("wrong", "lower", "share"))


def comparison(arms, seeds=(0,)):
    """Of {arm: {metric or cost: values by sample}}; every seed has the same."""
    samples = [Sample(str(i), "") for i in range(len(next(iter(next(iter(arms.values())).values()))))]
    made = Experiment("made", "", Made(), [Arm(name) for name in arms], next(iter(arms)), list, seeds=seeds)
    outcomes = {}
    for name, values in arms.items():
        for i, sample in enumerate(samples):
            row = {key: float(column[i]) for key, column in values.items()}
            cost = {key: row.pop(key) for key in ("tokens",) if key in row}
            outcomes |= {(name, sample.id, seed): Outcome(row, cost) for seed in seeds}
    return Comparison(made, samples, outcomes)


def test_contrasts_are_ratios_of_sums_and_paired_differences():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(1, 3, 30), rng.uniform(2, 5, 30)
    c = comparison({"fast": {"right": a > 2, "tokens": a}, "plain": {"right": b > 3, "tokens": b}})
    assert c.ratio("tokens", "fast", "plain").interval.mean == pytest.approx(a.sum() / b.sum())
    saved = c.saved("tokens", "fast", "plain")
    assert saved.interval.mean == pytest.approx(1 - a.sum() / b.sum())
    assert saved.interval == bootstrap_statistic(lambda pick: 1 - a[pick].sum() / b[pick].sum(), 30)
    assert str(saved).startswith("tokens saved, fast of plain: ") and "%" in saved.shown
    gap = c.gap("right", "fast", "plain")
    assert gap.interval == paired_bootstrap((a > 2).astype(float), (b > 3).astype(float))
    assert gap.what == "right, fast - plain" and c.value("right", "fast").interval.mean == np.mean(a > 2)


def test_what_neither_was_measured_nor_is_there_is_undecided():
    c = comparison({"a": {"right": [1, 1], "tokens": [1, math.nan]}, "b": {"right": [1, 1], "tokens": [0, 2]}})
    assert math.isnan(c.ratio("tokens", "a", "b").interval.mean)  # nothing in the sum that it is divided by
    assert math.isnan(c.saved("wrong", "a", "b").interval.mean)
    assert (
        below(c.ratio("tokens", "a", "b"), 1).outcome == at_least(c.saved("wrong", "a", "b"), 0).outcome == "undecided"
    )


def test_more_seeds_of_the_same_problem_are_no_more_units():
    """The interval is over problems; seeds that repeat them narrow nothing."""
    rng = np.random.default_rng(1)
    values = {"a": {"right": rng.uniform(size=12) < 0.8}, "b": {"right": rng.uniform(size=12) < 0.5}}
    once, often = comparison(values), comparison(values, seeds=tuple(range(20)))
    assert once.gap("right", "a", "b").interval == often.gap("right", "a", "b").interval
    assert often.gap("right", "a", "b").interval.n == 12


def test_samples_that_are_there_for_something_else_are_no_units():
    """A statistic is resampled over all samples; what it decides by are those that have a metric."""
    values = np.array([0.5, 0.7, 0.6, 0.8] + [math.nan] * 10)
    c = comparison({"a": {"right": values}, "b": {"right": values - 0.3}})
    total = Statistic("sum", "higher", "of what is right", lambda table: float(np.nansum(table["right"])))
    c.experiment = replace(c.experiment, statistics=(total,))
    assert c.gap("sum", "a", "b").interval.n == c.value("sum", "a").interval.n == 4
    assert above(c.gap("sum", "a", "b"), 0).outcome == "undecided"


def test_beats_shows_the_control_that_comes_nearest():
    base = np.tile([0.0, 0.0, 1.0], 20)
    c = comparison(
        {
            "method": {"right": np.ones(60), "wrong": np.zeros(60)},
            "near": {"right": np.tile([0.0, 1.0, 1.0], 20), "wrong": np.tile([1.0, 0.0, 0.0], 20)},
            "far": {"right": base, "wrong": 1 - base},
            "same": {"right": np.ones(60), "wrong": np.zeros(60)},
        }
    )
    found = beats(c, "right", "method", ["far", "near"])
    assert found.outcome == "holds" and found.text.startswith("right, method - near: +0.333")
    assert "above 0 against each of 2: holds" in found.text and "others +0.667" in found.text
    lower = beats(c, "wrong", "method", ["near"])  # less of it is better
    assert lower.outcome == "holds" and lower.text.startswith("wrong, near - method: +0.333")
    assert beats(c, "right", "method", ["far", "same"]).outcome == "undecided"
    assert beats(c, "right", "far", ["near", "method"]).outcome == "fails"


# --- experiments ---------------------------------------------------------------------------------------------------


def test_a_sweep_varies_one_setting():
    arms = sweep("credit", CreditDecoding(), "control", threshold=(0.7, 0.9), alpha=0.0)
    assert [arm.name for arm in arms] == ["credit 0.7", "credit 0.9"] and {arm.role for arm in arms} == {"control"}
    assert [(arm.setting["threshold"], arm.setting["alpha"]) for arm in arms] == [(0.7, 0.0), (0.9, 0.0)]
    made = Experiment("x", "", Roots(), [Arm("plain", role="plain"), *arms], "plain", list)
    assert Comparison(made, [], {}).sweep("credit") == {0.7: "credit 0.7", 0.9: "credit 0.9"}
    with pytest.raises(ValueError, match="unpack"):
        sweep("credit", CreditDecoding(), threshold=(0.7,), alpha=(0.0, 1.0))


def test_an_arm_is_identified_by_its_method():
    method = CreditDecoding(threshold=0.8)
    assert Arm("a", method).setting == method.model_dump(mode="json") and Arm("plain", role="plain").setting == {}
    assert Arm("a", method, apply={"min_p": None}).options == {"methods": [method], "min_p": None}


def declared(**changes):
    given = {"quick": 2, "model": "zoo/denoiser", "samples": 6, "seeds": (0, 1), **changes}

    @experiment("roots", CreditDecoding, **given)
    def build(run: Run) -> Design:
        arms = roots().arms
        facts = {"told": run.settings(CreditDecoding, threshold=0.8, alpha=0.3).model_dump()}
        return Design(Roots(run.samples), arms, "one step", notes=f"{run.size(100, 5)}", facts=facts)

    @build.findings
    def findings(c, told):
        yield Finding("closer", below(c.gap("error", "four steps", "one step"), 0), main=True)
        yield describe("settings", f"{told['threshold']} {told['alpha']}")

    return build


def test_a_declared_experiment_has_its_defaults_and_takes_others():
    build = declared()
    assert build.model == "zoo/denoiser"
    usual, quick, given = build(None, None), build(None, None, quick=True), build(None, None, 3, [7], quick=True)
    assert [(len(e.task.samples()), e.seeds, e.notes) for e in (usual, quick, given)] == [
        (6, (0, 1), "100"),
        (2, (0,), "5"),
        (3, (7,), "5"),
    ]
    found = usual.findings(compare(usual))
    assert found[1].numbers == "0.8 0.3" and verdict(found) == "reproduced"
    assert usual.claim == CreditDecoding.claim and declared(claim="Closer.")(None, None).claim == "Closer."


def test_what_a_method_sets_replaces_the_defaults():
    made = declared()(None, None, method=CreditDecoding(threshold=0.6))
    assert made.findings(compare(made))[1].numbers == "0.6 0.3"


@pytest.mark.parametrize("name", catalog.experiments())
def test_every_experiment_is_declared_under_its_name(name):
    build = importlib.import_module(catalog.experiment(name)[1]).build
    assert build.slug == name and build.judge and build.claim and build.quick < (build.samples or 1000)
    assert build.model == "smollm2" or build.model.removeprefix("zoo/") in {recipe.name for recipe in RECIPES}
    assert build.limit is None or build.limit > build.samples


# --- records -------------------------------------------------------------------------------------------------------


def test_a_record_says_what_its_main_number_is_of():
    """Of the model, unless the design says of what."""
    made = declared()(None, None)
    for on, said in (("", "m"), ("tokenizers", "tokenizers")):
        c = compare(replace(made, on=on))
        assert measured_on(evidence(c, made.findings(c), model="m", command="c")) == said


def test_a_record_holds_what_its_verdict_needs():
    made = declared()(None, None)
    c = compare(made)
    found = evidence(c, made.findings(c), model="m", command="c")
    assert found["verdict"] == verdict_in(found) == "reproduced"
    gap = c.gap("error", "four steps", "one step")
    assert measured(found) == gap.shown and [f["outcome"] for f in found["findings"]] == ["holds", "described"]
    found["findings"][0]["outcome"] = "undecided"
    assert verdict_in(found) == "undecided"  # from the findings, whatever was written beside them
