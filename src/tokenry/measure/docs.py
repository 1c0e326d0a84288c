"""Writes what the documentation says about numbers: `python -m tokenry.measure.docs` in the repository.

The ledger of README.md and docs/evidence.md, the pages of docs/evidence, the options, evidence and picture of
docs/methods/<slug>.md, the lists and contracts of docs/stages/<stage>.md, docs/paper-index.md, the models of
docs/zoo.md and methods and evidence in the menu of mkdocs.yml come from the evidence files, the methods' declarations
and the records of the zoo. With --check nothing is written, and the exit code says whether all is up to date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from .. import catalog
from ..zoo.recipes import RECIPES, record_of
from . import pages
from .ledger import load_evidence, measured, measured_on, measured_what, verdict_in
from .pictures import picture

__all__ = ["documents"]


def documents(root: Path) -> dict[Path, str]:
    """Every generated document: {path: what it should contain}."""
    docs = root / "docs"
    entries = {e["slug"]: e for e in load_evidence(docs / "evidence")}
    made = {docs / "evidence.md": ledger_page(entries)}
    for name, found in entries.items():
        reported = (docs / "evidence" / f"{name}.html").exists()
        made[docs / "evidence" / f"{name}.md"] = evidence_page(found, reported)
    made |= {docs / "pictures" / f"{name}.svg": picture(found) for name, found in entries.items()}
    blocks = [
        (root / "README.md", "evidence", ledger(entries, "docs/")),
        (root / "mkdocs.yml", "methods", pages.navigation()),
        (root / "mkdocs.yml", "evidence", pages.evidence_navigation(entries)),
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


def ledger(entries: dict[str, dict[str, Any]], folder: str = "") -> str:
    """What was published, and what was measured, on which model; at most one number a cell.

    Args:
        folder: where the documentation is, seen from the page.
    """
    rows = ["| claim of | published | measured | which is | on | verdict | numbers |", "|---|---|---|---|---|---|---|"]
    for entry, name in measurements():
        cells = ["", "", "", "not measured yet", ""]
        if found := entries.get(name):
            which, on, verdict = measured_what(found), measured_on(found), verdict_in(found)
            cells = [measured(found), which, on, verdict, f"[all]({folder}evidence/{name}.md)"]
        row = [f"[{name}]({folder}methods/{entry.slug}.md)", published_on(entry, name), *cells]
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def measurements() -> list[tuple[catalog.Entry, str]]:
    """Every experiment with the method that it is about."""
    return [(entry, name) for entry in catalog.METHODS for name in entry.experiments]


def published_on(entry: catalog.Entry, name: str) -> str:
    """The published number, where this experiment is the one that tests it."""
    claim = entry.load().published
    return str(claim) if claim and name == (claim.tested_by or entry.slug) else ""


def ledger_page(entries: dict[str, dict[str, Any]]) -> str:
    """What stands beside the table of all claims."""
    published = [(entry.slug, entry.load().published) for entry in catalog.METHODS]
    sources = [f"* {slug}: {claim}. {claim.source}." for slug, claim in published if claim]
    parts = [
        "# Evidence",
        "",
        "Generated from `docs/evidence/*.json` by `make docs`. `tokenry compare NAME` measures a claim again; behind "
        "each row are all numbers, and the command with its options. `tokenry compare --all --quick` runs all of them "
        "at their smallest size.",
        "",
        "A check holds, fails, or is undecided, by its 95 % interval. `reproduced`: every check holds. `partly`: the "
        "main one does. `not reproduced`: the main one fails. `undecided`: its interval is on both sides of the bound. "
        "Measured is the number that decides the main check, and which one that is; it is of a small model, and seldom "
        "in the unit of the published one. Nothing stands under published where no number could be read, and in "
        "rows about a part of the method, or about the same on another model. Models of the zoo are described in "
        "[zoo.md](zoo.md); `smollm2` is SmolLM2-135M-Instruct.",
        "",
        ledger(entries),
        "",
        "Published numbers, and the models and data that they are of:",
        "",
        *sources,
    ]
    return "\n".join(parts) + "\n"


def evidence_page(found: dict[str, Any], reported: bool) -> str:
    """All numbers of one experiment, with a link to its report where there is one."""
    parts = [f"# {found['slug']}: {verdict_in(found)}", "", "Generated by `make docs`.", "", found["claim"], ""]
    for finding in found["findings"]:
        main = ", main" if finding["main"] else ""
        parts.append(f"* **{finding['outcome']}{main}**: {finding['statement']}  ")
        parts.append(f"  {finding['numbers']}")
    parts += [part for text in (found["notes"], found.get("tried")) if text for part in ("", text)]
    parts += ["", f"{found['costs']}."] if found.get("costs") else []
    numbers = found["numbers"]
    if limit := found.get("limit"):
        ended = f"With {limit} samples it is at the limit that was fixed beforehand."
        allowed = f"While it is undecided it may be extended up to {limit} samples."
        parts += ["", ended if numbers["samples"] >= limit else allowed]
    parts += ["", *numbers_table(found), ""]
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    parts.append(
        f"{found['model']}, task `{found['task']}`, {numbers['samples']} samples, seeds {numbers['seeds']}; "
        f"`{found['command']}`; {found['date']}; {versions}."
    )
    if reported:
        parts += ["", f"[The report]({found['slug']}.html) has plots, and what each arm wrote."]
    return "\n".join(parts) + "\n"


def numbers_table(found: dict[str, Any]) -> list[str]:
    metrics = list(found["metrics"])
    arms = found["numbers"]["subjects"]
    costs = [n for n in next(iter(arms.values())) if n not in metrics]
    rows = ["| arm | " + " | ".join(metrics + costs) + " |", "|---|" + "---:|" * len(metrics + costs)]
    for name, values in arms.items():
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
