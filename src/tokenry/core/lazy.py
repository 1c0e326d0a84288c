"""Names that import their module when first used, so that importing a package costs nothing.

What a package gives stands in its stub, `__init__.pyi`, where editors and type checkers read it, too.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["exports"]


def exports(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package, from the stub beside its `file`.

    A module must not be called like something that its package gives: importing it would put the module under that
    name.
    """
    homes = _homes(Path(file).with_suffix(".pyi"))

    def getattribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        if home.strip("."):
            return getattr(import_module(home, package), name)
        return import_module(home + name, package)  # a submodule

    return getattribute, lambda: list(homes), sorted(homes)


def _homes(stub: Path) -> dict[str, str]:
    """{name: relative module} of the `from ... import ...` statements of a stub."""
    statements = ast.parse(stub.read_text(encoding="utf-8")).body
    imports = [node for node in statements if isinstance(node, ast.ImportFrom)]
    return {alias.name: "." * node.level + (node.module or "") for node in imports for alias in node.names}
