"""The run store: one SQLite file that survives a kill at any moment and takes several writers.

Every outcome is committed as soon as it is measured. A run is identified by what would change its numbers (see
`compare.identity`); resuming continues the latest run with the same signature.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from ..core.errors import InputError
from ..core.files import explained, shown
from ..core.hashes import digest
from .task import Outcome

__all__ = ["RunStore", "signature"]

# What is an arm in the code is called a subject in stores and records, where it has been called so before.
SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY, signature TEXT NOT NULL, created TEXT DEFAULT CURRENT_TIMESTAMP, about TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS outcomes (
    run INTEGER NOT NULL REFERENCES runs(id), subject TEXT NOT NULL, sample TEXT NOT NULL, seed INTEGER NOT NULL,
    metrics TEXT NOT NULL, cost TEXT NOT NULL, detail TEXT NOT NULL,
    PRIMARY KEY (run, subject, sample, seed));
"""


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"it holds {shown(value)} where an object is due")
    return value


def signature(about: Mapping[str, Any]) -> str:
    """A hash of everything that identifies a run."""
    return digest(about, 16)


class RunStore:
    """Outcomes of comparisons in one file. Use as a context manager, or `close()` it."""

    def __init__(self, path: str | Path) -> None:
        self.problem = f"the run store {str(path)!r} cannot be read"
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(path, timeout=60)
            self.db.execute("PRAGMA journal_mode=WAL")
            self.db.executescript(SCHEMA)
        except (OSError, ValueError, sqlite3.Error) as error:
            raise InputError(f"the run store {str(path)!r} cannot be opened ({error}); choose another path") from None

    def begin(self, about: Mapping[str, Any], resume: bool = False) -> int:
        """The number of a new run, or with `resume` of the latest one with the same signature."""
        key = signature(about)
        if resume:
            with explained(self.problem, "choose another path", sqlite3.Error):
                row = self.db.execute("SELECT max(id) FROM runs WHERE signature = ?", (key,)).fetchone()
            if row[0] is not None:
                return row[0]
        with self.db:
            made = self.db.execute("INSERT INTO runs (signature, about) VALUES (?, ?)", (key, json.dumps(about)))
        return cast(int, made.lastrowid)

    def add(self, run: int, rows: Iterable[tuple[str, str, int, Outcome]]) -> None:
        """Commit (arm, sample, seed, outcome) rows together."""
        with self.db:
            self.db.executemany(
                "INSERT OR REPLACE INTO outcomes VALUES (?, ?, ?, ?, ?, ?, ?)",
                [
                    (run, arm, sample, seed, json.dumps(o.metrics), json.dumps(o.cost), json.dumps(o.detail))
                    for arm, sample, seed, o in rows
                ],
            )

    def outcomes(self, run: int) -> dict[tuple[str, str, int], Outcome]:
        """Everything measured in a run: {(arm, sample, seed): outcome}."""
        columns = "subject, sample, seed, metrics, cost, detail"
        with explained(self.problem, "choose another path", sqlite3.Error):
            rows = self.db.execute(f"SELECT {columns} FROM outcomes WHERE run = ?", (run,)).fetchall()
            return {(row[0], row[1], row[2]): Outcome(*map(_object, row[3:])) for row in rows}

    def close(self) -> None:
        self.db.close()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
