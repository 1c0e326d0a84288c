"""Pictures of what was measured: an evidence entry as an SVG text, drawn without running anything."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

__all__ = ["picture"]

WIDTH, ROW, LEFT, GAP, TOP = 820, 22, 240, 28, 46
PANELS = 3  # metrics side by side
MANY = 13  # with more subjects than these, each has its place in a plane of cost and quality
COSTS = {"cache_bytes": "cache in MB", "forward_passes": "forward passes"}  # what sweeps are about, best first
ROLES = {"plain": "#6b7280", "control": "#d97706", "method": "#2563eb"}
PALETTE = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#ca8a04", "#db2777", "#4b5563", "#84cc16")
ARROWS = {"higher": " ↑", "lower": " ↓", None: ""}


def picture(found: dict[str, Any]) -> str:
    """A sweep as lines of quality over cost; anything else as dots, with intervals, in a row for each subject."""
    cost = next((name for name in COSTS if name in _first(found)), None)
    if cost and len(found["numbers"]["subjects"]) > MANY:
        return _plane(found, cost)
    return _dots(found)


# --- dots ----------------------------------------------------------------------------------------------------------


def _dots(found: dict[str, Any]) -> str:
    subjects, metrics = found["subjects"], list(found["metrics"])[:PANELS]
    width = (WIDTH - LEFT - GAP * len(metrics)) / len(metrics)
    bottom = TOP + ROW * len(subjects)
    parts = [
        _text(LEFT - 10, TOP + ROW * i + 15, s["name"], "end", "bold" if s["role"] == "method" else "")
        for i, s in enumerate(subjects)
    ]
    for number, metric in enumerate(metrics):
        left = LEFT + number * (width + GAP) + GAP / 2
        parts += _panel(found, metric, left, left + width)
    parts += _legend(bottom + 38)
    note = f"whiskers: 95 % interval of the paired difference from {found['baseline']}"
    parts.append(_text(WIDTH - 10, bottom + 38, note, "end", "small"))
    return _svg(bottom + 52, parts)


def _panel(found: dict[str, Any], metric: str, left: float, right: float) -> Iterator[str]:
    rows = [_interval(found, s["name"], metric) for s in found["subjects"]]
    known = [value for row in rows if row for value in row]
    low, high = _padded(min(known), max(known))

    def x(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    bottom = TOP + ROW * len(rows)
    title = metric.replace("_", " ") + ARROWS[found["metrics"][metric]["better"]]
    yield _text((left + right) / 2, TOP - 26, title, "middle", "bold")
    for tick in _ticks(low, high):
        yield _line(x(tick), TOP, x(tick), bottom, "grid")
        yield _text(x(tick), TOP - 8, f"{tick:g}", "middle", "small")
    base = _first(found, found["baseline"]).get(metric)
    if base is not None:
        yield _line(x(base), TOP, x(base), bottom, "base")
    for i, (row, subject) in enumerate(zip(rows, found["subjects"])):
        if row:
            y, color = TOP + ROW * i + ROW / 2, ROLES[subject["role"]]
            yield _line(x(row[1]), y, x(row[2]), y, "whisker", color)
            yield f'<circle cx="{x(row[0]):.1f}" cy="{y}" r="4" fill="{color}"/>'


def _interval(found: dict[str, Any], subject: str, metric: str) -> tuple[float, float, float] | None:
    """The mean, and the ends of its difference from the baseline, laid upon the baseline; None if not measured."""
    mean = _first(found, subject).get(metric)
    difference = found["numbers"]["differences"].get(subject, {}).get(metric)
    if mean is None:
        return None
    if not difference or None in difference:
        return mean, mean, mean
    base = mean - difference[0]
    return mean, base + difference[1], base + difference[2]


def _legend(y: float) -> Iterator[str]:
    for number, (role, color) in enumerate(ROLES.items()):
        x = 20 + 85 * number
        yield f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{color}"/>'
        yield _text(x + 10, y, role, "start", "small")


# --- quality over cost ---------------------------------------------------------------------------------------------


def _plane(found: dict[str, Any], cost: str) -> str:
    metric = next(iter(found["metrics"]))
    points = {}
    for subject in found["subjects"]:
        values = _first(found, subject["name"])
        if values[metric] is not None and values[cost]:
            points.setdefault(_series(subject["name"]), []).append((math.log(values[cost]), values[metric]))
    every = [point for line in points.values() for point in line]
    (x_low, x_high), (y_low, y_high) = (_padded(min(v), max(v)) for v in zip(*every))
    left, right, top, bottom = 60, 530, 20, 330

    def place(point: Sequence[float]) -> tuple[float, float]:
        across, up = (point[0] - x_low) / (x_high - x_low), (point[1] - y_low) / (y_high - y_low)
        return left + across * (right - left), bottom - up * (bottom - top)

    parts = []
    for tick in _ticks(y_low, y_high):
        y = place((x_low, tick))[1]
        parts += [_line(left, y, right, y, "grid"), _text(left - 8, y + 4, f"{tick:g}", "end", "small")]
    unit = 1e6 if cost == "cache_bytes" else 1
    for tick in _log_ticks(math.exp(x_low) / unit, math.exp(x_high) / unit):
        x = place((math.log(tick * unit), y_low))[0]
        parts += [_line(x, top, x, bottom, "grid"), _text(x, bottom + 16, f"{tick:g}", "middle", "small")]
    for number, (name, line) in enumerate(points.items()):
        parts += _curve([place(point) for point in sorted(line)], number, name, right + 30, top + 10 + 24 * number)
    parts.append(_text((left + right) / 2, bottom + 36, COSTS[cost] + " for a sample", "middle", "bold"))
    title = metric.replace("_", " ") + ARROWS[found["metrics"][metric]["better"]]
    parts.append(
        f'<g transform="translate(14 {(top + bottom) / 2}) rotate(-90)">{_text(0, 0, title, "middle", "bold")}</g>'
    )
    return _svg(bottom + 48, parts)


def _curve(line: Sequence[tuple[float, float]], number: int, name: str, x: float, y: float) -> Iterator[str]:
    color = PALETTE[number % len(PALETTE)]
    path = " ".join(f"{across:.1f},{up:.1f}" for across, up in line)
    yield f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>'
    fill = color if number < len(PALETTE) else "#fff"  # hollow where the colors begin again
    for across, up in [*line, (x, y - 4)]:
        yield f'<circle cx="{across:.1f}" cy="{up:.1f}" r="3.5" fill="{fill}" stroke="{color}"/>'
    yield _text(x + 12, y, name, "start", "small")


def _series(name: str) -> str:
    """A subject's name without the number that a sweep varies."""
    return re.sub(r"^\d+: |[ ,]+[\d.]+$", "", name)


# --- small pieces --------------------------------------------------------------------------------------------------


def _first(found: dict[str, Any], subject: str | None = None) -> dict[str, Any]:
    """What was measured of a subject; of the first one by default."""
    subjects = found["numbers"]["subjects"]
    return subjects[subject] if subject is not None else next(iter(subjects.values()))


def _padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers between the two."""
    power = 10.0 ** math.floor(math.log10(high - low))
    for step in (power * 2, power, power / 2, power / 5):
        ticks = [round(step * i, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        if len(ticks) > 2:
            break
    return ticks


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, color: str = "") -> str:
    stroke = f' stroke="{color}"' if color else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"{stroke}/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'


def _svg(height: float, parts: Sequence[str]) -> str:
    style = (
        "text { font: 13px sans-serif; fill: #1f2937 } .bold { font-weight: bold } .small { font-size: 11px } "
        ".grid { stroke: #e5e7eb } .base { stroke: #6b7280; stroke-dasharray: 4 3 } .whisker { stroke-width: 2 }"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}">'
    return "\n".join(
        [head, f"<style>{style}</style>", '<rect width="100%" height="100%" rx="6" fill="#fff"/>', *parts, "</svg>", ""]
    )
