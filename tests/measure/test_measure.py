"""Measuring: statistics, the run store, interleaving, resuming, the report and the evidence."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.comparing import Roots, experiment

from tokenry import InputError
from tokenry.measure import report
from tokenry.measure.compare import Comparison, Interrupted, compare
from tokenry.measure.cost import Meter
from tokenry.measure.ledger import evidence
from tokenry.measure.statistics import Interval, bootstrap_statistic, paired_bootstrap
from tokenry.measure.store import RunStore, signature
from tokenry.measure.task import Statistic

# --- a small real task: how far an arm's estimate of a square root is off ------------------------------------


# --- statistics ----------------------------------------------------------------------------------------------------


def test_bootstrap_mean_is_exact_and_the_interval_covers():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        first, second = rng.normal(1.0, 1, 30), rng.normal(0.0, 1, 30)
        interval = paired_bootstrap(first, second, resamples=1000, seed=trial)
        assert interval.mean == pytest.approx((first - second).mean())
        covered += interval.low <= 1.0 <= interval.high
    assert 0.87 <= covered / 200 <= 0.99


def test_a_statistic_of_means_is_the_paired_bootstrap():
    rng = np.random.default_rng(2)
    first, second = rng.normal(1.0, 1, 40), rng.normal(0.0, 1, 40)
    expected = paired_bootstrap(first, second, resamples=1000)
    found = bootstrap_statistic(lambda pick: (first[pick] - second[pick]).mean(), 40)
    assert found == pytest.approx(expected)
    assert bootstrap_statistic(lambda pick: 3.0, 1)[:3] == (3.0, -math.inf, math.inf)
    undefined = bootstrap_statistic(lambda pick: math.nan, 5)
    assert math.isnan(undefined.mean) and math.isnan(undefined.low)


def test_a_comparison_shows_statistics_like_metrics():
    """A ratio of sums: its value, its interval, its paired difference; in the table, the report and the evidence."""
    ratio = Statistic("relative", "lower", "summed error / summed size", lambda v: v["error"].sum() / v["size"].sum())
    result = compare(replace(experiment(), statistics=(ratio,)))
    table = {s: result.table(s) for s in result.arms}
    assert table["one step"]["error"].shape == (6, 2) and np.isnan(table["one step"]["cache_bytes"]).all()
    expected = {s: t["error"].sum() / t["size"].sum() for s, t in table.items()}
    assert result.mean("one step", "relative") == pytest.approx(expected["one step"])
    interval = result.interval("one step", "relative")
    assert interval.low < interval.mean < interval.high
    gap = result.difference("four steps", "one step", "relative")
    assert gap.mean == pytest.approx(expected["four steps"] - expected["one step"]) and gap.high < 0
    assert result.to_dict()["differences"]["four steps"]["relative"][0] == pytest.approx(gap.mean, abs=1e-6)
    assert [c[0] for c in report.columns(result)][:2] == ["relative", "error"]
    html = report.render(result, [], "reproduced", model="m", command="c", versions="v")
    assert "summed error / summed size" in html and report.format_number("relative", gap.mean, signed=True) in html


def test_bootstrap_edge_cases():
    assert paired_bootstrap([1, 2, 3], [1, 2, 3])[:3] == (0, 0, 0)
    assert paired_bootstrap([2.0], [1.0])[1:] == (-math.inf, math.inf, 1)
    assert paired_bootstrap([1.0, math.nan], [0.5, 3.0]).n == 1
    assert math.isnan(paired_bootstrap([], []).mean)
    with pytest.raises(ValueError, match="pairs"):
        paired_bootstrap([1], [1, 2])
    assert paired_bootstrap([5, 6, 7], [1, 2, 3]).excludes_zero


def test_intervals_at_their_edges():
    """A bound of exactly 0 does not exclude it; one sample says nothing, two do; no numbers, no bounds."""
    assert not Interval(-1.0, -2.0, 0.0, 5).excludes_zero and not Interval(1.0, 0.0, 2.0, 5).excludes_zero
    assert Interval(-1.0, -2.0, -0.5, 5).excludes_zero and Interval(1.0, 0.5, 2.0, 5).excludes_zero
    assert f"{Interval(1.0, 0.5, 2.0, 5)}" == str(Interval(1.0, 0.5, 2.0, 5))
    assert paired_bootstrap([3.0], [1.0]) == (2.0, -math.inf, math.inf, 1)
    assert paired_bootstrap([math.nan], [1.0]).n == 0
    assert bootstrap_statistic(lambda picks: 2.0, 1) == (2.0, -math.inf, math.inf, 1)
    assert bootstrap_statistic(lambda picks: 2.0, 2) == (2.0, 2.0, 2.0, 2)
    never = bootstrap_statistic(lambda picks: math.nan, 3)
    assert never.n == 3 and math.isnan(never.low) and math.isnan(never.high)


# --- compare -------------------------------------------------------------------------------------------------------


def test_arms_run_interleaved_and_differences_are_paired():
    task = Roots()
    comparison = compare(experiment(task))
    batches = [tuple(ids) for _, ids, _ in task.log]
    assert all(batches[i] == batches[i + 1] for i in range(0, len(batches), 2))
    assert task.log[0][0] == "one step" and task.log[2][0] == "four steps"  # who goes first rotates
    expected = np.mean(comparison.values("four steps", "error") - comparison.values("one step", "error"))
    assert comparison.difference("four steps", "one step", "error").mean == pytest.approx(expected)
    assert comparison.values("one step", "error").shape == (6,)  # averaged over seeds
    assert comparison.costs() == ["seconds", "tokens"]
    assert comparison.experiment.findings(comparison)[0].holds


@pytest.mark.parametrize("stop_at", [0, 1, 5, 11])
def test_an_interrupted_run_is_kept_and_resumed(tmp_path, stop_at):
    whole = compare(experiment())
    with RunStore(tmp_path / "runs.sqlite") as store, pytest.raises(Interrupted, match=f"{2 * stop_at} of 24"):
        compare(experiment(Roots(stop_at=stop_at)), store)
    task = Roots()
    with RunStore(tmp_path / "runs.sqlite") as store:
        resumed = compare(experiment(task), store, resume=True)
    assert len(task.log) == 12 - stop_at
    assert resumed.to_dict() == whole.to_dict()


def test_a_run_can_be_extended(tmp_path):
    with RunStore(tmp_path / "runs.sqlite") as store:
        compare(experiment(Roots(4), seeds=(0,)), store)
        task = Roots(6)
        extended = compare(experiment(task, seeds=(0, 1)), store, resume=True)
    assert extended.to_dict() == compare(experiment()).to_dict()
    assert len(task.log) == 8  # two arms: one new batch of seed 0, three of seed 1


def test_a_run_with_other_settings_is_not_resumed(tmp_path):
    with RunStore(tmp_path / "runs.sqlite") as store:
        compare(experiment(), store, about={"model": "a"})
        task = Roots()
        compare(experiment(task), store, about={"model": "b"}, resume=True)
        assert len(task.log) == 12
        task = Roots()
        compare(experiment(task), store, about={"model": "b"}, resume=True)
        assert task.log == []
    assert signature({"a": 1, "b": 2}) == signature({"b": 2, "a": 1}) != signature({"a": 1})


WRITER = """
import sys
from tokenry.measure.store import RunStore
from tokenry.measure.task import Outcome
path, number = sys.argv[1:]
with RunStore(path) as store:
    run = store.begin({"writer": number})
    for i in range(25):
        store.add(run, [("s", f"{number}-{i}", 0, Outcome({"x": float(i)}))])
"""


def test_several_writers_share_a_store(tmp_path):
    path = tmp_path / "runs.sqlite"
    RunStore(path).close()
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(n)]) for n in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    with RunStore(path) as store:
        assert sum(len(store.outcomes(run)) for run in (1, 2, 3)) == 75


def test_a_store_survives_a_kill(tmp_path):
    """The process is killed without warning between two batches; what was committed is there."""
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from support.comparing import Roots, experiment
from tokenry.measure.compare import compare
from tokenry.measure.store import RunStore
class Killed(Roots):
    def run(self, *args):
        if len(self.log) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(*args)
compare(experiment(Killed()), RunStore({str(tmp_path / "runs.sqlite")!r}))
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    with RunStore(tmp_path / "runs.sqlite") as store:
        task = Roots()
        compare(experiment(task), store, resume=True)
    assert len(task.log) == 9


def test_an_unusable_store_is_refused(tmp_path):
    (tmp_path / "file").write_text("not a database, but long enough to be taken for one " * 20)
    with pytest.raises(InputError, match="cannot be opened"):
        RunStore(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be opened"):
        RunStore(tmp_path / "file" / "below.sqlite")


# --- report and evidence -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(experiment())


def test_the_report_is_self_contained(comparison):
    findings = comparison.experiment.findings(comparison)
    html = report.render(comparison, findings, "reproduced", model="m", command="tokenry <x>", versions="v")
    assert not re.search(r"(src|href)\s*=|https?://(?!www\.w3\.org/2000/svg)|@import|url\(", html)
    assert "tokenry &lt;x&gt;" in html and html.count("</script>") == 2  # data cannot end its element
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', html, re.S).group(1))
    assert [s["name"] for s in data["arms"]] == ["one step", "four steps"]
    assert len(data["samples"]) == 6
    interval = data["arms"][0]["values"]["error"]
    assert interval["low"] <= interval["mean"] <= interval["high"]


def test_the_page_has_no_more_of_a_detail_than_it_draws():
    result = compare(experiment())
    for key, outcome in result.outcomes.items():
        result.outcomes[key] = replace(outcome, detail={"note": "seen", "rates": [0.5] * 1000})
    html = report.render(result, [], "reproduced", model="m", command="c", versions="v")
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', html, re.S).group(1))
    assert all(detail == {"note": "seen"} for sample in data["samples"] for detail in sample["details"].values())
    assert set(report.DRAWN) == set(re.findall(r"detail\.(\w+)", html))


def test_the_table_fits_a_terminal(comparison):
    import io

    from rich.console import Console

    console = Console(width=80, file=io.StringIO())
    for table in report.tables(comparison):
        console.print(table)
    text = console.file.getvalue()
    assert "four steps" in text and "…" not in text and "error ↓" in text


def test_numbers_are_readable():
    assert report.format_number("x", 0.12345) == "0.123"
    assert report.format_number("peak_bytes", 12_345_678) == "12.35"
    assert report.format_number("x", math.nan) == "-"
    assert report.format_number("x", 1.5, signed=True) == "+1.500"


def test_evidence_says_what_was_measured(comparison):
    findings = comparison.experiment.findings(comparison)
    entry = evidence(comparison, findings, model="m", command="c")
    entry = json.loads(json.dumps(entry))
    assert entry["numbers"]["subjects"]["four steps"]["error"] < entry["numbers"]["subjects"]["one step"]["error"]
    low, high = entry["numbers"]["differences"]["four steps"]["error"][1:]
    assert low <= entry["numbers"]["differences"]["four steps"]["error"][0] <= high
    assert entry["subjects"][1] == {"name": "four steps", "role": "method", "setting": {"steps": 4}}
    assert {"python", "torch", "transformers", "tokenry"} <= set(entry["versions"])


def test_the_meter_sees_time_and_memory():
    with Meter() as meter:
        block = np.ones(400_000_000, np.uint8)
        block[::4096] = 2
        del block
    assert meter.seconds > 0
    assert math.isnan(meter.peak_bytes) or meter.peak_bytes > 300e6


def test_an_interval_is_shown_in_one_format():
    interval = Interval(-0.0041, -0.013, 0.0042, 450)
    assert f"{interval:+.3f}" == "-0.004 [-0.013, +0.004]"
    assert f"{Interval(0.5, 0.25, 1.0, 9):.1%}" == "50.0% [25.0%, 100.0%]"
    assert f"{interval}" == str(interval)
