"""represent: one vector for each line of a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..core.errors import InputError
from ..core.fields import Batch, Tokens
from ..core.outputs import check_file, write_file
from .options import (
    Number,
    as_json,
    example,
    force_option,
    load_model,
    model_options,
    parse_methods,
    progress,
    read_entries,
    say,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ..represent.contract import Encoder

SUFFIXES = (".npy", ".parquet")


@click.command(epilog=example("tokenry represent --method token-prepending sentences.txt --output vectors.npy"))
@click.argument("file")
@click.option("--method", "slug", help="A represent method; default: the plain prompt.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="An option of the method.")
@click.option("--output", required=True, help="Where to write: .npy (lines, width), or .parquet (text, embedding).")
@click.option("--batch-size", type=Number(Batch), default=16, show_default=True)
@click.option(
    "--max-seq-length", type=Number(Tokens), help="Tokens of a line with its prompt at most; default: the model's."
)
@click.option("--truncate", is_flag=True, help="Cut longer lines at their end; without it they are refused.")
@force_option
@model_options
def represent(
    file: str,
    slug: str | None,
    options: tuple[str, ...],
    output: str,
    batch_size: int,
    force: bool,
    max_seq_length: int | None,
    truncate: bool,
    model_name: str,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
    json_output: bool,
) -> None:
    """Embed the sentences of FILE, one a line; '-' reads standard input."""
    if slug is None and options:
        raise InputError(f"the option {options[0]!r} needs a method; add --method, see `tokenry list`")
    (method,) = parse_methods([slug], options, "represent") if slug is not None else (None,)
    check_output(output, force)
    texts = read_lines(file)
    from ..represent.contract import encoder_of

    loaded = load_model(model_name, dtype, device, trust_remote_code)
    encoder = encoder_of(method, loaded)
    encoder.max_seq_length, encoder.truncate = max_seq_length, truncate
    vectors = encode(encoder, texts, batch_size)
    write_file(output, lambda part: write(part, texts, vectors))
    if json_output:
        about = {"method": slug, "options": method.model_dump(mode="json") if method else {}}
        about |= {"model": model_name, "dtype": str(loaded.model.dtype)}
        as_json({"output": output, "shape": list(vectors.shape), **about})
    else:
        say(f"{output}: {vectors.shape[0]} vectors of width {vectors.shape[1]}")


def check_output(path: str, force: bool) -> None:
    """Refuse what could not be written, before anything is computed."""
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise InputError(f"--output {path!r} ends in {suffix!r}; give a file that ends in {' or '.join(SUFFIXES)}")
    if suffix == ".parquet":
        from importlib.util import find_spec

        if find_spec("pyarrow") is None:
            raise InputError("Parquet needs pyarrow; run `pip install pyarrow` or give an --output that ends in .npy")
    check_file(path, force)


def read_lines(file: str) -> list[str]:
    """The lines of a file; vectors and lines must match, so that an empty line is refused."""
    texts = read_entries(file, "file", "give one sentence a line")
    if not any(texts):
        raise InputError(f"the file {file!r} is empty; give one sentence a line")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            raise InputError(f"line {number} of {file!r} is empty; remove it")
    return texts


def encode(encoder: Encoder, texts: Sequence[str], batch_size: int) -> NDArray:
    """Embed with a progress bar on standard error."""
    with progress("embedding", len(texts)) as update:
        return encoder.encode(texts, batch_size, lambda done, total, *_: update(completed=done)).numpy()


def write(path: Path, texts: Sequence[str], vectors: NDArray) -> None:
    if path.suffix == ".npy":
        import numpy as np

        np.save(path, vectors)
        return
    import pyarrow
    from pyarrow import parquet

    embedding = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.ravel()), vectors.shape[1])
    parquet.write_table(pyarrow.table({"text": texts, "embedding": embedding}), path)
