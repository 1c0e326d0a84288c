"""Reading: what a `read` method found, as rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..core.errors import InputError

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Reading"]


@dataclass(frozen=True)
class Reading:
    """Rows of equal keys, JSON values; None where something is not known.

    Attributes:
        title: one line that says what the rows are.
        rows: one dict per finding, in order.
    """

    title: str
    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def to_frame(self) -> DataFrame:
        """The rows as a pandas data frame.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            from pandas import DataFrame
        except ImportError:
            raise InputError("a data frame needs pandas; `pip install pandas`, or use .rows") from None
        return DataFrame(self.rows)

    def plot(self) -> Table:
        """A table for a terminal or notebook: `rich.print(reading.plot())`. Of lists it shows the first five."""
        table = Table(title=self.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for name, value in (self.rows[0] if self.rows else {}).items():
            text = isinstance(value, str | list)
            table.add_column(name.replace("_", " "), justify="left" if text else "right", no_wrap=not text)
        for row in self.rows:
            table.add_row(*(Text(_show(value)) for value in row.values()))
        return table


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(map(_show, value[:5]))
    if isinstance(value, str):
        return repr(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
