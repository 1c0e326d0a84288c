"""Artifact: what a method has learned, stored as tensors and a header, and checked before anything is built of it.

An artifact says what it is (`kind`, `version`), where its parts lie (`layout`), what its header holds (`fields`) and
for whom it was made (`made_for`). Saving, loading and the refusal of another model are the same for all. What a model's
fingerprint is, is not known here: `check_made_for` takes it as a value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple, Protocol, TypeVar

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import core_schema

from .errors import InputError
from .files import explained, parse_json, read_json
from .outputs import write_artifact, write_file, write_text
from .schemas import Fields, Schema, unmet
from .tensors import read_tensors, tensor_file

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

__all__ = ["Artifact", "ArtifactField", "Folder", "Header", "JsonFile", "MadeFor", "TensorFile", "header_of"]

Kind = TypeVar("Kind", bound="Artifact")


class Header(Fields):
    """What every header holds."""

    format: int = Field(ge=1)


class MadeFor(Fields):
    """The model that something was made for."""

    model: str
    fingerprint: str


def header_of(value: Any, schema: type[Schema], newest: int, what: str) -> Schema:
    """A header as its schema says; call it inside `explained`.

    Raises:
        InputError: a newer format; `what` says of what, such as "the probe in 'folder'".
        ValueError: the first field that is missing or wrong.
    """
    try:
        found = Header.model_validate(value).format
        if found > newest:
            raise InputError(f"{what} has format {found}, this version reads {newest}; update tokenry")
        return schema.model_validate(value)
    except ValidationError as error:
        raise ValueError(unmet(error)) from None


class Artifact:
    """Base of what methods learn. A subclass sets the class attributes and gives `stored` and `restored`.

    Class attributes: `kind` (its name in refusals), `version` (the newest format of its header that is read, and the
    one that is written), `layout` (`Folder`, `TensorFile` or `JsonFile`), `fields` (schema of the header), `remedy`
    (how refusals of a file end), and how they begin: `unread` for one that is damaged or not there, `foreign` for
    something else ("": as `unread`), `named` for a newer one, `stranger` for another model, `unbound` for saving
    without one. In the texts, `{path!r}`, `{kind}`, `{found}` and the entries of `made_for` are filled in.

    Attributes:
        made_for: for whom it was made, as the header says; at least its "fingerprint". None: for nobody yet.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    layout: ClassVar[Layout]
    fields: ClassVar[type[Header]] = Header
    remedy: ClassVar[str]
    unread: ClassVar[str] = "there is no {kind} in {path!r}"
    foreign: ClassVar[str] = ""
    named: ClassVar[str] = "the {kind} in {path!r}"
    stranger: ClassVar[str] = (
        "the {kind} was trained for {model!r} (weights {fingerprint}), not for the weights {found}; train one for this "
        "model"
    )
    unbound: ClassVar[str] = "the {kind} belongs to no model yet; call bind(model) before save"
    errors: ClassVar[tuple[type[Exception], ...]] = ()  # of libraries, beside the usual, that building it may raise

    if TYPE_CHECKING:  # where it is kept is the subclass's business: an attribute, a field or a property
        made_for: Mapping[str, Any] | None

    def stored(self) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
        """Its tensors, and what the header says beside the format."""
        raise NotImplementedError

    @classmethod
    def restored(cls, header: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """What `stored` gave, as an object again; the header is as `fields` says.

        Raises:
            ValueError: header and tensors that do not belong together.
        """
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write tensors (safetensors) and header (JSON).

        Raises:
            InputError: it is bound to no model, or it cannot be written.
        """
        if self.made_for is None:
            raise InputError(self.unbound.format(kind=self.kind))
        tensors, header = self.stored()
        self.layout.write(path, tensors, {"format": self.version, **header})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: nothing there, something else, a damaged one, or one of a newer version.
        """
        words = {"kind": cls.kind, "path": str(path)}
        with explained(cls.unread.format(**words), cls.remedy, *cls.errors):
            header = cls.layout.header(path)
            if cls.foreign and not isinstance(header, dict):
                raise InputError(f"{cls.foreign.format(**words)}; {cls.remedy}")
            header_of(header, cls.fields, cls.version, cls.named.format(**words))
            return cls.restored(header, cls.layout.tensors(path))

    @classmethod
    def opened(cls, value: Any) -> Any:
        """The artifact that lies at a path; what is no path comes back as it is."""
        return cls.load(value) if isinstance(value, str | Path) else value

    def check_made_for(self, found: str, **words: Any) -> None:
        """Refuse another fingerprint than the one it was made for; one that was made for nobody fits all.

        Args:
            words: what else `stranger` tells.
        """
        if self.made_for is not None and found != self.made_for["fingerprint"]:
            raise InputError(self.stranger.format(**{**self.made_for, **words, "kind": self.kind, "found": found}))

    def digest(self) -> str:
        """A short hash of all that is stored."""
        from safetensors.torch import save

        tensors, header = self.stored()
        packed = save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"header": json.dumps(header)})
        return hashlib.sha256(packed).hexdigest()[:12]


# --- where it lies ---------------------------------------------------------------------------------------------------


class Layout(Protocol):
    """How tensors and a header lie at a path; the readers raise what broken files raise, see `explained`."""

    def write(self, path: str | Path, tensors: Mapping[str, Tensor], header: dict[str, Any]) -> None: ...

    def header(self, path: str | Path) -> Any: ...

    def tensors(self, path: str | Path) -> dict[str, Tensor]: ...


class Folder(NamedTuple):
    """Two files of a folder, which is made."""

    weights: str
    text: str

    def write(self, path: str | Path, tensors: Mapping[str, Tensor], header: dict[str, Any]) -> None:
        write_artifact(path, tensors, header, self)

    def header(self, path: str | Path) -> Any:
        return read_json(Path(path) / self.text)

    def tensors(self, path: str | Path) -> dict[str, Tensor]:
        return read_tensors(Path(path) / self.weights)[0]


class TensorFile(NamedTuple):
    """One safetensors file; the header is one of the texts in it."""

    key: str

    def write(self, path: str | Path, tensors: Mapping[str, Tensor], header: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        together = {name: tensor.contiguous() for name, tensor in tensors.items()}
        texts = {self.key: json.dumps(header, ensure_ascii=False)}
        write_file(path, partial(save_file, together, metadata=texts))

    def header(self, path: str | Path) -> Any:
        with tensor_file(path) as file:
            return parse_json((file.metadata() or {}).get(self.key, "null"))

    def tensors(self, path: str | Path) -> dict[str, Tensor]:
        return read_tensors(path)[0]


class JsonFile(NamedTuple):
    """One JSON file, of what has no tensors. Older ones say no format, which is 1."""

    def write(self, path: str | Path, tensors: Mapping[str, Tensor], header: dict[str, Any]) -> None:
        write_text(path, json.dumps(header) + "\n")

    def header(self, path: str | Path) -> Any:
        value = read_json(path)
        return {"format": 1, **value} if isinstance(value, dict) else value

    def tensors(self, path: str | Path) -> dict[str, Tensor]:
        return {}


# --- as an option of a method ----------------------------------------------------------------------------------------


class Stored:
    """Marks a field that takes an artifact: as object, or as the path where it lies, which is read at once."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        named = core_schema.plain_serializer_function_ser_schema(
            lambda one: f"{type(one).__name__} {one.digest()}",
            return_schema=core_schema.str_schema(),
            when_used="json",
        )
        kept = core_schema.is_instance_schema(source)
        return core_schema.no_info_before_validator_function(source.opened, kept, serialization=named)

    def __get_pydantic_json_schema__(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, str]:
        return {"type": "string", "format": "path"}


ArtifactField = Annotated[Kind, Stored()]
