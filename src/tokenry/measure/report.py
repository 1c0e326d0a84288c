"""The report of a comparison: one self-contained HTML file, and the same table for a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from .claims import Finding
from .compare import Comparison
from .statistics import Interval
from .task import COSTS

__all__ = ["format_number", "render", "tables"]

ARROWS = {"higher": "↑", "lower": "↓", None: ""}
MEGABYTES = ("peak_bytes", "cache_bytes")
ACROSS = 4  # metrics side by side in a terminal
PLOT_SAMPLES = 24  # texts shown; the table always covers all
DRAWN = ("tokens", "marks", "hits", "denoising", "note")  # of the detail of an outcome: what the page shows


def columns(comparison: Comparison) -> list[tuple[str, str, str]]:
    """(name, arrow, description) of every metric and measured cost."""
    metrics = [(m.name, ARROWS[m.better], m.description) for m in comparison.experiment.qualities]
    return metrics + [(c, "", COSTS[c]) for c in comparison.costs()]


def label(name: str) -> str:
    """A column heading; bytes are shown in megabytes."""
    return name.replace("_bytes", " MB").replace("_", " ") if name in MEGABYTES else name.replace("_", " ")


def format_number(name: str, value: float, signed: bool = False) -> str:
    """Three significant digits, or a dash for a missing value."""
    if value is None or math.isnan(value):
        return "-"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    value = value / 1e6 if name in MEGABYTES else value
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 10 else 3
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def format_difference(name: str, interval: Interval) -> str:
    """mean [low, high]"""
    mean, low, high = (format_number(name, v, signed=True) for v in interval[:3])
    return f"{mean} [{low}, {high}]"


def tables(comparison: Comparison) -> list[Table]:
    """The comparison for a terminal: quality with paired differences from the baseline, a few metrics at a time, then
    costs."""
    base, qualities = comparison.experiment.baseline, comparison.experiment.qualities
    made = []
    for first in range(0, len(qualities), ACROSS):
        shown = qualities[first : first + ACROSS]
        headings = [f"{label(m.name)} {ARROWS[m.better]}".strip() for m in shown]
        rows = {s: [_cell(comparison, s, m.name, base) for m in shown] for s in comparison.arms}
        made.append(_table(comparison, "quality", headings, rows))
    made[-1].caption = f"second and third line: paired difference from {base}, 95 % interval"
    rows = {s: [format_number(c, comparison.mean(s, c)) for c in comparison.costs()] for s in comparison.arms}
    return [*made, _table(comparison, "cost per sample", [label(c) for c in comparison.costs()], rows)]


def _table(
    comparison: Comparison, title: str, headings: Sequence[str], rows: Mapping[str, Sequence[str | Text]]
) -> Table:
    grid = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    grid.add_column("arm", no_wrap=True)
    for heading in headings:
        grid.add_column(heading, justify="right")
    for arm in comparison.experiment.arms:
        grid.add_row(arm.name, *rows[arm.name], style="bold" if arm.role == "method" else None)
    return grid


def _cell(comparison: Comparison, arm: str, name: str, base: str) -> str | Text:
    mean = format_number(name, comparison.mean(arm, name))
    if arm == base:
        return mean
    difference = comparison.difference(arm, base, name)
    shown = format_difference(name, difference).replace(" [", "\n[", 1)
    return Text.assemble(mean, ("\n" + shown, "dim"))


def render(
    comparison: Comparison, findings: Sequence[Finding], verdict: str, *, model: str, command: str, versions: str
) -> str:
    """The report as one HTML text without any outside reference."""
    experiment = comparison.experiment
    shown = columns(comparison)
    rows = []
    for arm in experiment.arms:
        cells = []
        for name, _, _ in shown:
            cells.append(_html_cell(comparison, arm.name, name, experiment.baseline))
        rows.append({"name": arm.name, "role": arm.role, "cells": cells})
    template = jinja2.Environment(autoescape=True).from_string(
        (files("tokenry.measure") / "report.html").read_text(encoding="utf-8")
    )
    return template.render(
        title=experiment.slug,
        claim=experiment.claim,
        verdict=verdict,
        findings=findings,
        model=model,
        task=experiment.task.slug,
        samples=comparison.samples,
        seeds=experiment.seeds,
        baseline=experiment.baseline,
        columns=[{"label": label(n), "arrow": a, "description": d} for n, a, d in shown],
        rows=rows,
        command=command,
        versions=versions,
        data=_script_json(_data(comparison)),
    )


def _html_cell(comparison: Comparison, arm: str, name: str, base: str) -> dict[str, Any]:
    """Mean and difference from the baseline. Samples of a batch share their cost, so costs get a ratio instead."""
    mean, plain = comparison.mean(arm, name), comparison.mean(base, name)
    cell = {"mean": format_number(name, mean), "difference": "", "sure": False}
    if arm == base:
        return cell
    if name in COSTS:
        return {**cell, "difference": f"× {mean / plain:.2f}" if plain > 0 and not math.isnan(mean) else ""}
    difference = comparison.difference(arm, base, name)
    return {**cell, "difference": format_difference(name, difference), "sure": difference.excludes_zero}


def _data(comparison: Comparison) -> dict[str, Any]:
    """What the script of the page draws."""
    names = [n for n, _, _ in columns(comparison)]
    seed = comparison.experiment.seeds[0]
    return {
        "metrics": [m.name for m in comparison.experiment.qualities],
        "costs": comparison.costs(),
        "cost": "cache_bytes" if comparison.experiment.task.stage == "select" else next(iter(comparison.costs()), None),
        "arms": [
            {"name": s.name, "role": s.role, "values": {n: _interval(comparison, s.name, n) for n in names}}
            for s in comparison.experiment.arms
        ],
        "samples": [
            {
                "title": sample.prompt[-70:] if len(sample.prompt) > 70 else sample.prompt,
                "prompt": sample.prompt[-600:],
                "details": {
                    s: {name: value for name, value in outcome.detail.items() if name in DRAWN}
                    for s in comparison.arms
                    if (outcome := comparison.outcomes.get((s, sample.id, seed)))
                },
            }
            for sample in comparison.samples[:PLOT_SAMPLES]
        ],
    }


def _interval(comparison: Comparison, arm: str, name: str) -> dict[str, float] | None:
    interval = comparison.interval(arm, name)
    if math.isnan(interval.mean):
        return None
    alone = interval.n == 1 or name in COSTS or math.isnan(interval.low)
    low, high = (interval.mean, interval.mean) if alone else (interval.low, interval.high)
    return {"mean": interval.mean, "low": low, "high": high}


def _script_json(data: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))
