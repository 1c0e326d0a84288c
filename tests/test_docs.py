"""The documentation: generated parts are up to date, examples run, links lead somewhere."""

import re
from pathlib import Path

import pytest

from tokenry import catalog
from tokenry.measure.claims import VERDICTS
from tokenry.measure.docs import documents, evidence_table, fill
from tokenry.measure.ledger import is_older, load_evidence, verdict_in

ROOT = Path(__file__).parent.parent


def test_generated_parts_are_up_to_date():
    """`make docs` would change nothing."""
    for path, text in documents(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale; run `make docs`"


def test_the_readme_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["ids"].shape[1] > names["inputs"]["input_ids"].shape[1]


@pytest.mark.parametrize("page", sorted([ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")]), ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_measured_method_has_evidence_with_controls():
    folder = ROOT / "docs" / "evidence"
    entries = {e["slug"]: e for e in load_evidence(folder)}
    measured = [name for entry in catalog.METHODS for name in entry.experiments]
    assert sorted(entries) == sorted(path.stem for path in folder.glob("*.json")) == sorted(measured)
    for name in measured:
        found = entries[name]
        older = ("reproduced", "direction only", "not reproduced")
        assert verdict_in(found) in (older if is_older(found) else VERDICTS)
        roles = {s["role"] for s in found["subjects"]}
        assert roles == {"plain", "control", "method"} and found["numbers"]["samples"] > 1
        assert found["findings"] and all(f["numbers"] for f in found["findings"])


def test_a_cell_of_the_ledger_holds_at_most_one_number():
    """With its interval; the published one may say what it is compared with."""
    rows = evidence_table({e["slug"]: e for e in load_evidence(ROOT / "docs" / "evidence")}).splitlines()[2:]
    assert len(rows) == len(catalog.experiments())
    for row in rows:
        _, _, published, measured, *_ = row.split("|")
        assert re.fullmatch(r" ([-+]?[\d.]+%?( \[[-+\d.%]+, [-+\d.%]+\]| times)?)? ", measured), row
        assert len(published) < 80, row


def test_blocks_must_exist():
    assert fill("a\n<!-- x -->\nold\n<!-- /x -->\n", "x", "new") == "a\n<!-- x -->\nnew\n<!-- /x -->\n"
    with pytest.raises(ValueError, match="block"):
        fill("no block", "x", "new")
