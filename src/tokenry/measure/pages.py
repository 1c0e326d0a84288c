"""The generated parts of the pages about stages, methods and papers, and of the site's menu."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, cast

from .. import catalog
from ..core.method import Method
from .ledger import main_of, measured_on, verdict_in

__all__ = ["contract", "evidence_navigation", "evidence_of", "method_list", "navigation", "paper_index"]

PAPER = re.compile(r"(.*), arXiv (\d{4}\.\d{5})")


# --- a method's page -----------------------------------------------------------------------------------------------


def evidence_of(entry: catalog.Entry, entries: dict[str, dict[str, Any]]) -> str:
    """What was measured of a method: a row and a picture for each of its comparisons."""
    found = [entries[name] for name in entry.experiments if name in entries]
    if not found:
        return "No comparison of its own is recorded. Where it is a part or a baseline of another method's, see there."
    rows = ["| comparison | verdict | main finding | on |", "|---|---|---|---|"]
    for one in found:
        link = f"[{one['slug']}](../evidence/{one['slug']}.md)"
        rows.append(f"| {link} | {verdict_in(one)} | {main_of(one)['statement']} | {measured_on(one)} |")
    for one in found:
        rows += ["", f"![{one['slug']}: what was measured](../pictures/{one['slug']}.svg)", "", f"`{one['command']}`"]
    return "\n".join(rows)


# --- a stage's page ------------------------------------------------------------------------------------------------


def method_list(stage: str, entries: dict[str, dict[str, Any]]) -> str:
    """The methods of a stage, with the verdict of the first comparison of each."""
    rows = ["| method | what it does | verdict |", "|---|---|---|"]
    for entry in catalog.by_stage(stage):
        rows.append(f"| [{entry.slug}](../methods/{entry.slug}.md) | {entry.summary} | {_verdict(entry, entries)} |")
    return "\n".join(rows)


def contract(stage: str) -> str:
    """The classes that a stage's methods are made from, as code without bodies."""
    classes = {}
    for entry in catalog.by_stage(stage):
        base = next(parent for parent in reversed(entry.load().__mro__) if _is_method(parent))
        for value in vars(sys.modules[base.__module__]).values():
            if _is_method(value) and value.__module__ == base.__module__:
                classes[value.__name__] = value
    return "\n\n\n".join(["```py", *map(_outline, classes.values())]).replace("\n\n\n", "\n", 1) + "\n```"


def _is_method(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Method) and value is not Method


def _outline(cls: type) -> str:
    """A class as it stands in its file, but for values, what is private, and what functions do."""
    source = inspect.getsource(cls)
    tree = cast(ast.ClassDef, ast.parse(source).body[0])
    lines = source.splitlines()
    parts = [_head(tree, lines)]
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and "ClassVar" in ast.unparse(node.annotation) and not node.value:
            parts += ["", *lines[node.lineno - 1 : node.end_lineno]]
        elif isinstance(node, ast.FunctionDef) and _is_public(node):
            parts += ["", _head(node, lines)]
    return "\n".join(parts)


def _is_public(node: ast.FunctionDef) -> bool:
    validates = any("validator" in ast.unparse(decorator) for decorator in node.decorator_list)
    return not validates and (not node.name.startswith("_") or node.name == "__call__")


def _head(node: ast.ClassDef | ast.FunctionDef, lines: Sequence[str]) -> str:
    """The lines up to the body, and the first sentence of the docstring."""
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.:]) (?=[A-Z])", text)[0]
    body = " " * node.body[0].col_offset + (f'"""{sentence}"""' if text else "...")
    return "\n".join([*lines[first - 1 : node.body[0].lineno - 1], body])


def _verdict(entry: catalog.Entry, entries: dict[str, dict[str, Any]]) -> str:
    name = next((name for name in entry.experiments if name in entries), None)
    return f"[{verdict_in(entries[name])}](../evidence/{name}.md)" if name else ""


# --- papers and the menu -------------------------------------------------------------------------------------------


def paper_index(entries: dict[str, dict[str, Any]]) -> str:
    """Every paper that a method comes from, by arXiv number."""
    rows = []
    for entry in catalog.METHODS:
        for paper in entry.load().paper.split("; "):
            title, number = cast(re.Match, PAPER.fullmatch(paper)).groups()
            method = f"[{entry.slug}](methods/{entry.slug}.md)"
            verdict = _verdict(entry, entries).replace("../", "")
            link = f"[{number}](https://arxiv.org/abs/{number})"
            rows.append((number, f"| {title} | {link} | {method} | {entry.stage} | {verdict} |"))
    head = ["| paper | arXiv | method | stage | verdict |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(row for _, row in sorted(rows, key=lambda row: row[0]))])


def navigation() -> str:
    """The methods for the menu of the site, by stage, as YAML; one with two entries stands where its first one is."""
    lines, listed = [], set()
    for stage in catalog.STAGES:
        lines.append(f"      - {stage}:")
        for entry in catalog.by_stage(stage):
            if entry.slug not in listed:
                listed.add(entry.slug)
                lines.append(f'          - "{entry.load().title}": methods/{entry.slug}.md')
    return "\n".join(lines)


def evidence_navigation(entries: Iterable[str]) -> str:
    """The pages of all comparisons for the menu of the site, as YAML."""
    return "\n".join(f"      - {name}: evidence/{name}.md" for name in sorted(entries))
