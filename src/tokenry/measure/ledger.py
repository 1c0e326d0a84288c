"""Evidence: what was measured, kept as `docs/evidence/<slug>.json` and never typed by hand."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .claims import Finding, verdict, verdict_of
from .compare import Comparison

__all__ = [
    "evidence",
    "load_evidence",
    "main_of",
    "measured",
    "measured_on",
    "measured_what",
    "verdict_in",
    "versions",
]

SIDE_BY_SIDE = "seconds and peak memory are not compared: batches were measured side by side, on Ray"


def versions() -> dict[str, str]:
    """What the numbers were measured with."""
    packages = {name: version(name) for name in ("tokenry", "torch", "transformers")}
    return {"python": platform.python_version(), **packages, "cpus": str(os.cpu_count())}


def evidence(comparison: Comparison, findings: Sequence[Finding], *, model: str, command: str) -> dict[str, Any]:
    """One evidence entry as JSON values."""
    experiment = comparison.experiment
    return {
        "slug": experiment.slug,
        "claim": experiment.claim,
        "verdict": verdict(findings),
        "findings": [_finding(finding) for finding in findings],
        "model": model,
        "on": experiment.on or model,
        "task": experiment.task.slug,
        "identity": {name: value for name, value in comparison.identity.items() if name != "subjects"},
        "baseline": experiment.baseline,
        "subjects": [{"name": arm.name, "role": arm.role, "setting": arm.setting} for arm in experiment.arms],
        "metrics": {m.name: {"better": m.better, "description": m.description} for m in experiment.qualities},
        "numbers": comparison.to_dict(),
        "notes": experiment.notes,
        "tried": experiment.tried,
        "limit": experiment.limit,
        **({"costs": SIDE_BY_SIDE} if comparison.side_by_side else {}),
        "command": command,
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    number = finding.check and finding.check.number
    return {
        "statement": finding.statement,
        "outcome": finding.outcome,
        "main": finding.main,
        "numbers": finding.numbers,
        "measured": {"what": number.what, "shown": number.shown} if number else None,
    }


def load_evidence(folder: str | Path) -> list[dict[str, Any]]:
    """All entries of a folder, by slug."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]


# --- records -------------------------------------------------------------------------------------------------------


def verdict_in(record: Mapping[str, Any]) -> str:
    """The verdict that follows from the findings of a record."""
    outcomes = [finding["outcome"] for finding in record["findings"] if finding["outcome"] != "described"]
    return verdict_of(main_of(record)["outcome"], outcomes)


def measured(record: Mapping[str, Any]) -> str:
    """The number of the main finding with its interval."""
    return main_of(record)["measured"]["shown"]


def measured_what(record: Mapping[str, Any]) -> str:
    """What that number is."""
    return main_of(record)["measured"]["what"]


def measured_on(record: Mapping[str, Any]) -> str:
    """The model that the number is of, or what else it is of."""
    return record["on"]


def main_of(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The main finding."""
    return next(finding for finding in record["findings"] if finding["main"])
