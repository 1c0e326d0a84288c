"""What readings look like in a browser: one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Protocol

import jinja2
from markupsafe import Markup

__all__ = ["page"]


class Drawn(Protocol):
    """What a page shows of a reading: its title, rows of equal columns, and the HTML above them, or ""."""

    @property
    def title(self) -> str: ...

    @property
    def rows(self) -> Sequence[dict[str, Any]]: ...

    def picture(self) -> str: ...


def page(readings: Sequence[Drawn]) -> str:
    """A page with the picture of each reading above its rows; what the rows say is escaped."""
    source = files("tokenry.read.pages").joinpath("page.html").read_text("utf-8")
    template = jinja2.Environment(autoescape=True).from_string(source)
    return template.render(sections=[_section(reading) for reading in readings])


def _section(reading: Drawn) -> dict[str, Any]:
    columns = list(reading.rows[0]) if reading.rows else []
    cells = [[_cell(row[name]) for name in columns] for row in reading.rows]
    return {"title": reading.title, "picture": Markup(reading.picture()), "columns": columns, "rows": cells}


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(map(_cell, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
