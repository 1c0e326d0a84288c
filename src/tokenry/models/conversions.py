"""What is made of a model's file once and kept in the cache folder: complete or absent.

It is built in a temporary folder and renamed, so that two processes may start at once, and a damaged copy is rebuilt.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

__all__ = ["converted"]

CACHE_FORMAT = 1  # raise when a conversion changes, so that older copies are rebuilt
MANIFEST = "tokenry.json"


def converted(source: Path, target: Path, convert: Callable[[Path, Path], None]) -> Path:
    """The folder `target`, which `convert(source, folder)` fills where it is not there yet."""
    if _is_complete(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not _is_complete(target):  # another process may have built it while this one waited
            work = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
            try:
                convert(source, work)
                files = {file.name: file.stat().st_size for file in work.iterdir()}
                manifest = {"format": CACHE_FORMAT, "source": source.name, "files": files}
                (work / MANIFEST).write_text(json.dumps(manifest))
                shutil.rmtree(target, ignore_errors=True)
                work.rename(target)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return target


def _is_complete(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["format"] == CACHE_FORMAT and all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False
