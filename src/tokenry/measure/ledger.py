"""Evidence: what was measured, kept as `docs/evidence/<slug>.json` and never typed by hand."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .compare import Comparison
from .task import Finding

__all__ = ["evidence", "load_evidence", "versions"]


def versions() -> dict[str, str]:
    """What the numbers were measured with."""
    packages = {name: version(name) for name in ("tokenry", "torch", "transformers")}
    return {"python": platform.python_version(), **packages, "cpus": str(os.cpu_count())}


def evidence(
    comparison: Comparison, findings: Sequence[Finding], verdict: str, *, model: str, command: str
) -> dict[str, Any]:
    """One evidence entry as JSON values."""
    experiment = comparison.experiment
    return {
        "slug": experiment.slug,
        "claim": experiment.claim,
        "verdict": verdict,
        "findings": [{"statement": f.statement, "holds": bool(f.holds), "numbers": f.numbers} for f in findings],
        "model": model,
        "task": experiment.task.slug,
        "identity": {name: value for name, value in comparison.identity.items() if name != "subjects"},
        "baseline": experiment.baseline,
        "subjects": [{"name": s.name, "role": s.role, "setting": s.setting} for s in experiment.subjects],
        "metrics": {m.name: {"better": m.better, "description": m.description} for m in experiment.qualities},
        "numbers": comparison.to_dict(),
        "notes": experiment.notes,
        "command": command,
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def load_evidence(folder: str | Path) -> list[dict[str, Any]]:
    """All entries of a folder, by slug."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]
