"""Writes what the documentation says about numbers: `python -m tokenry.measure.docs` in the repository.

The evidence table of README.md, docs/evidence.md, the options, evidence and picture of docs/methods/<slug>.md, the
lists and contracts of docs/stages/<stage>.md, docs/paper-index.md, the models of docs/zoo.md and the methods in the
menu of mkdocs.yml come from the evidence files, the methods' declarations and the records of the zoo. With --check
nothing is written, and the exit code says whether all is up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from .. import catalog
from ..zoo.recipes import RECIPES, record_of
from . import pages
from .ledger import load_evidence
from .pictures import picture

__all__ = ["documents"]


def documents(root: Path) -> dict[Path, str]:
    """Every generated document: {path: what it should contain}."""
    docs = root / "docs"
    entries = {e["slug"]: e for e in load_evidence(docs / "evidence")}
    made = {docs / "evidence.md": evidence_page(entries)}
    made |= {docs / "pictures" / f"{name}.svg": picture(found) for name, found in entries.items()}
    blocks = [
        (root / "README.md", "evidence", evidence_table(entries)),
        (root / "mkdocs.yml", "methods", pages.navigation()),
        (docs / "zoo.md", "zoo", zoo_table()),
        (docs / "paper-index.md", "papers", pages.paper_index(entries)),
    ]
    for entry in catalog.METHODS:
        page = docs / "methods" / f"{entry.slug}.md"
        # A second entry of the same name has its table on the same page.
        second = catalog.get(entry.slug) is not entry
        blocks.append((page, f"{entry.stage} options" if second else "options", options_table(entry)))
        if not second:
            blocks.append((page, "evidence", pages.evidence_of(entry, entries)))
    for stage in catalog.STAGES:
        page = docs / "stages" / f"{stage}.md"
        blocks += [(page, "methods", pages.method_list(stage, entries)), (page, "contract", pages.contract(stage))]
    for path, name, content in blocks:
        made[path] = fill(made.get(path) or path.read_text(encoding="utf-8"), name, content)
    return made


def fill(text: str, name: str, content: str) -> str:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`, in YAML between `# <name>` and `# </name>`."""
    pattern = rf"((?:<!-- {name} -->|# <{name}>)\n).*?( *# </{name}>|<!-- /{name} -->)"
    filled, count = re.subn(pattern, lambda m: m[1] + content + "\n" + m[2], text, flags=re.S)
    if count != 1:
        raise ValueError(f"expected one <!-- {name} --> ... <!-- /{name} --> block, found {count}")
    return filled


def options_table(entry: catalog.Entry) -> str:
    rows = ["| option | default | allowed | meaning |", "|---|---|---|---|"]
    for o in entry.load().options():
        default = o.default.replace("<", "&lt;")  # a mark such as </think> would vanish as a tag
        rows.append(f"| `{o.name}` | {default} | {o.range or o.type} | {o.description} |")
    return "\n".join(rows)


def zoo_table() -> str:
    """The recipes with what building them has measured."""
    rows = ["| model | parameters | what it does | learns from | reached |", "|---|---:|---|---|---|"]
    for recipe in RECIPES:
        record = record_of(recipe.name) or {"measures": {}}
        reached = ", ".join(f"{name} {value:.3g}" for name, value in record["measures"].items())
        rows.append(f"| zoo/{recipe.name} | {recipe.size:g} M | {recipe.task} | {recipe.data} | {reached} |")
    return "\n".join(rows)


def evidence_table(entries: dict[str, dict[str, Any]]) -> str:
    rows = ["| method | stage | claim | verdict | main number |", "|---|---|---|---|---|"]
    for entry in catalog.METHODS:
        for name in entry.experiments:
            found = entries.get(name)
            link = f"[{name}](docs/methods/{entry.slug}.md)"
            if found:
                main = found["findings"][0]["numbers"]
                rows.append(f"| {link} | {entry.stage} | {found['claim']} | {found['verdict']} | {main} |")
            else:
                rows.append(f"| {link} | {entry.stage} | {entry.summary} | not measured yet | |")
    return "\n".join(rows)


def evidence_page(entries: dict[str, dict[str, Any]]) -> str:
    parts = ["# Evidence", "", "Generated from `docs/evidence/*.json` by `make docs`. Each entry is one command."]
    for found in entries.values():
        parts += ["", f"## {found['slug']}", "", f"**{found['verdict']}**: {found['claim']}", ""]
        for finding in found["findings"]:
            parts.append(f"* **{'yes' if finding['holds'] else 'no'}**: {finding['statement']}  ")
            parts.append(f"  {finding['numbers']}")
        if found["notes"]:
            parts += ["", found["notes"]]
        parts += ["", *numbers_table(found), ""]
        numbers, versions = found["numbers"], ", ".join(f"{k} {v}" for k, v in found["versions"].items())
        parts.append(
            f"{found['model']}, task `{found['task']}`, {numbers['samples']} samples, seeds {numbers['seeds']}; "
            f"`{found['command']}`; {found['date']}; {versions}."
        )
    return "\n".join(parts) + "\n"


def numbers_table(found: dict[str, Any]) -> list[str]:
    metrics = list(found["metrics"])
    subjects = found["numbers"]["subjects"]
    costs = [n for n in next(iter(subjects.values())) if n not in metrics]
    rows = ["| subject | " + " | ".join(metrics + costs) + " |", "|---|" + "---:|" * len(metrics + costs)]
    for name, values in subjects.items():
        cells = [_cell(values[n], found["numbers"]["differences"].get(name, {}).get(n)) for n in metrics + costs]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*rows, "", f"In brackets: 95 % interval of the paired difference from {found['baseline']}."]


def _cell(value: float | None, difference: list[float | None] | None) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}"
    if difference and difference[1] is not None:
        text += f" [{difference[1]:+.3g}, {difference[2]:+.3g}]"
    return text


def main() -> int:
    root = Path.cwd()
    stale = []
    for path, text in documents(root).items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{'stale' if '--check' in sys.argv else 'written'}: {path.relative_to(root)}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
