"""What a read method is: what it reads, what it learns for that, and the rows it finds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, Field, RootModel
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..core.errors import InputError
from ..core.method import Method
from ..core.progress import Progress
from ..core.schemas import Exchanged
from ..models.load import Loaded
from ..trace.trace import Trace

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Fitted", "ReadAnswer", "ReadMethod", "ReadRequest", "Reading"]


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

    def to_json(self) -> dict[str, Any]:
        """Title and rows."""
        return asdict(self)

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

    def picture(self) -> str:
        """HTML that stands above the rows in `to_html`; everything in it that comes from outside is escaped."""
        return ""

    def to_html(self) -> str:
        """A self-contained page."""
        from .pages import page

        return page([self])

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


class ReadRequest(Exchanged):
    """What is read: at most one of a text and a trace."""

    text: str | None = None
    trace: str | None = Field(default=None, description="file of a saved trace of the model")
    artifact: str | None = Field(default=None, description="what `tokenry fit` has saved for the model")


class ReadAnswer(RootModel[list[Reading]]):
    """What was found: a table for each thing that was asked."""


class Fitted(NamedTuple):
    """What a method has learned: the artifact, what was seen on the way, and how good it is, in a few words."""

    artifact: Any
    readings: list[Reading]
    quality: str


class ReadMethod(Method):
    """A method of the read stage.

    loaded = load()
    names = LMHeadNeurons().fit(loaded).artifact
    LMHeadNeurons().read("She stayed at home", names, loaded).to_frame()

    Class attributes: `takes` (what `read` reads), `artifact` (the type that it learns or makes, with `save`),
    `saved_as` (whether that is a file or a folder), `learns_from` (what `fit` needs beside the model, in words; empty
    for nothing). Of its options `fit_options` shape the artifact and `input_options` concern what is read; all others
    ask something of the artifact, see `browse`.
    """

    stage: ClassVar[str] = "read"
    input: ClassVar[type[BaseModel]] = ReadRequest
    output: ClassVar[type[BaseModel]] = ReadAnswer

    takes: ClassVar[tuple[Literal["text", "trace"], ...]] = ()
    artifact: ClassVar[type | None] = None
    saved_as: ClassVar[Literal["file", "folder"]] = "folder"
    learns_from: ClassVar[str] = ""
    fit_options: ClassVar[tuple[str, ...]] = ()
    input_options: ClassVar[tuple[str, ...]] = ()

    def examples(self, source: str, text: str | None) -> Any:
        """What `fit` learns from.

        Args:
            source: the name of a file, or of a task with a number of examples, such as "arithmetic:320".
            text: what is in the file; None for a task.
        """
        raise InputError(f"{self.slug} learns from the model alone; leave {source!r} out")

    def fit(self, loaded: Loaded, data: Any = None, progress: Progress | None = None) -> Fitted:
        """Learn from what `examples` gives. `progress` is called with (done, all)."""
        raise InputError(f"{self.slug} learns nothing; read with it")

    def load(self, path: str, loaded: Loaded) -> Any:
        """The artifact that was saved at a path; one that was made for another model is refused."""
        raise InputError(f"{self.slug} needs nothing that was learned; leave {path!r} out")

    def browse(self, artifact: Any) -> list[Reading]:
        """What the options ask of the artifact itself."""
        return []

    def read(self, given: str | Trace, artifact: Any = None, loaded: Loaded | None = None) -> Reading:
        """What a text or a trace says."""
        raise InputError(f"{self.slug} reads no text and no trace; leave it out")
