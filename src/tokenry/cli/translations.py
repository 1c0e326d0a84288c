"""judge: label translations by references, learn from them, and estimate others without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..core.files import records_of
from ..core.outputs import check_folder, write_folder
from .options import as_json, progress, read_text, say

if TYPE_CHECKING:
    from ..judge.contract import TranslationMethod
    from ..judge.quality.answer import TranslationRow

__all__ = ["judge_translations"]


def judge_translations(
    method: TranslationMethod,
    files: Sequence[str],
    save: str | None,
    force: bool,
    json_output: bool,
    opening: Callable[..., Any],
) -> None:
    """Label the translations of all files, and learn from them where that is asked for; or estimate them."""
    from ..judge.quality.answer import JudgedTranslations

    rows = [row for path in files for row in read_translations(path)]
    if save:
        check_folder(save, force)
    method.check(rows, learns=bool(save))
    if method.estimates:
        judged = method.estimate(rows)
    else:
        missing = any(row.translation is None for row in rows)
        judged = method.label(rows, opening(translates=True) if missing else None)
    if save:
        with progress("train", None) as update:
            learned = method.fit(judged, lambda done, total, *_: update(completed=done, total=total))
        write_folder(save, lambda folder: [part.save_pretrained(folder) for part in learned], force)
        click.echo(f"estimator: {save}", err=True)
    said = JudgedTranslations(judged)
    as_json(said.to_json()) if json_output else say(said.table())


def read_translations(path: str) -> list[TranslationRow]:
    """The translations of a file of JSON lines."""
    from ..core.schemas import checked
    from ..judge.quality.answer import TranslationRow

    remedy = 'write lines like {"source": "...", "reference": "..."}'
    text = read_text(path, "file of translations")
    return records_of(
        text, path, "translations", remedy, lambda row, where: checked(TranslationRow, row, where, remedy)
    )
