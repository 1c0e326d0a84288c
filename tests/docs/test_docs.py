"""The documentation: generated parts are up to date, examples run, links lead somewhere."""

import ast
import pydoc
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from click.testing import CliRunner

from tokenry import catalog
from tokenry.cli import main
from tokenry.measure.claims import VERDICTS
from tokenry.measure.docs import documents, fill, ledger, published_on
from tokenry.measure.ledger import load_evidence, measured_what, verdict_in
from tokenry.measure.pages import contract
from tokenry.measure.pictures import picture

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
STANDING_ALONE = ("tip", "budget-forcing", "optimal-mdsd", "spectr", "specreason")  # nothing of the reader's is needed
EXECUTED = [
    *(DOCS / f"{name}.md" for name in ("index", "quickstart", "compose")),
    *sorted((DOCS / "stages").glob("*.md")),
    *(DOCS / "methods" / f"{slug}.md" for slug in STANDING_ALONE),
]
BEGINNINGS = ("zoo", *(f"methods/{slug}" for slug in "masked-diffusion creditdecoding daedal tidar dcsqe".split()))


def test_generated_parts_are_up_to_date():
    """`make docs` would change nothing."""
    for path, text in documents(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale; run `make docs`"


def test_the_readme_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["ids"].shape[1] > names["inputs"]["input_ids"].shape[1]


def blocks_of(page: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the code blocks in these languages; "" is none."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.S | re.M)
    return [(language, text) for language, text in blocks if language in languages]


def run_block(language: str, text: str, names: dict) -> None:
    """Run a code block of a page: Python in the page's own names, `sh` line by line as commands of tokenry."""
    if language == "python":
        exec(compile(text, "page", "exec"), names)
    else:
        for command in text.strip().replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(command)
            assert program == "tokenry"
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 0, f"{command}: {result.output}"


@pytest.mark.parametrize("page", EXECUTED, ids=lambda p: p.stem)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    blocks = blocks_of(page, "python", "sh")
    assert blocks
    for language, text in blocks:
        run_block(language, text, names)


@pytest.mark.parametrize("name", BEGINNINGS)
def test_the_first_example_of_a_page_runs(name):
    language, text = blocks_of(DOCS / f"{name}.md", "python")[0]
    run_block(language, text, {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_what_the_examples_import_is_there(page):
    """Also where an example needs the reader's own texts or models, and so cannot run as it stands."""
    for _, text in blocks_of(page, "python"):
        imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), page.name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_dotted_names_in_the_text_are_there(page):
    for name in re.findall(r"`(tokenry(?:\.[A-Za-z_]+)+)", page.read_text(encoding="utf-8")):
        if name.endswith("CompressKVPress"):
            continue  # needs kvpress
        assert pydoc.locate(name) is not None, f"{page.name}: {name}"


def commands_of(page: Path) -> list[list[str]]:
    """The words of every command of tokenry in a page's blocks."""
    text = "".join(text for _, text in blocks_of(page, "sh", "")).replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.startswith("tokenry ")]


@pytest.mark.parametrize("page", [p for p in PAGES if commands_of(p)], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_commands_of_a_page_are_understood(page):
    """Every verb and option is known to the command line, and every -o to one of the methods named."""
    for words in commands_of(page):
        asked = [word for word in words if word not in (">", "2>")]
        result = CliRunner().invoke(main, [*asked, "--help"])
        assert result.exit_code == 0, f"{page.name}: tokenry {shlex.join(words)}: {result.output}"
        slugs = [value for flag, value in pairwise(words) if flag in ("--method", "-m")]
        if words[0] in ("compare", "fit") and words[1] in {entry.slug for entry in catalog.METHODS}:
            slugs.append(words[1])
        known = {option.name for slug in slugs for option in catalog.get(slug, words[0]).load().options()}
        assert {value.partition("=")[0] for flag, value in pairwise(words) if flag == "-o"} <= known, words


# --- links ---------------------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """Where a link into a page may lead: its headings, as Python-Markdown and GitHub name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path) if path else page
        assert found.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(found), f"{page.name} links to {target}"


def test_every_page_is_in_the_menu():
    def listed(entry):
        if isinstance(entry, str):
            return [entry]
        return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in listed(part)]

    menu = listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    docs = ROOT / "docs"
    assert sorted(menu) == sorted(str(page.relative_to(docs)) for page in docs.rglob("*.md"))


def test_the_site_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "check_site.py"), str(tmp_path)]
    (tmp_path / "index.html").write_text('<a href="https://arxiv.org">a link to follow</a><img src="picture.svg">')
    (tmp_path / "site.css").write_text("a { background: url(picture.png) }")
    assert subprocess.run(command, capture_output=True, text=True).returncode == 0
    (tmp_path / "more.html").write_text('<script src="https://example.org/a.js"></script>')
    (tmp_path / "more.css").write_text(
        '@import "//example.org/b.css"; a { background: url(https://example.org/c.png) }'
    )
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 1
    for address in ("https://example.org/a.js", "//example.org/b.css", "https://example.org/c.png"):
        assert address in found.stdout


# --- generated parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", catalog.STAGES)
def test_the_contract_of_a_stage_is_code(stage):
    (code,) = re.findall(r"```py\n(.*?)```", contract(stage), re.S)
    classes = ast.parse(code).body
    assert classes and all(isinstance(one, ast.ClassDef) and ast.get_docstring(one) for one in classes)
    functions = [node.name for one in classes for node in one.body if isinstance(node, ast.FunctionDef)]
    assert functions and all(name == "__call__" or not name.startswith("_") for name in functions)


def shapes(found: dict) -> tuple[list[str], list[dict]]:
    """The texts and the dots of an entry's picture."""
    root = ElementTree.fromstring(picture(found))
    texts = [node.text for node in root.iter() if node.tag.endswith("}text")]
    return texts, [node.attrib for node in root.iter() if node.tag.endswith("}circle")]


def entry_of(values: dict[str, float | None], cost: str = "seconds") -> dict:
    """An entry with one metric; each value is measured 0.1 to both sides."""
    base = next(iter(values.values()))
    return {
        "baseline": next(iter(values)),
        "subjects": [{"name": name, "role": "method" if i else "plain"} for i, name in enumerate(values)],
        "metrics": {"exact": {"better": "higher", "description": "right"}},
        "numbers": {
            "subjects": {name: {"exact": value, cost: 1.0 + i} for i, (name, value) in enumerate(values.items())},
            "differences": {
                name: {"exact": None if v is None else [v - base, v - base - 0.1, v - base + 0.1]}
                for name, v in list(values.items())[1:]
            },
        },
    }


def test_a_picture_has_a_row_for_each_subject():
    texts, dots = shapes(entry_of({"plain": 0.5, "a < b": 0.75, "unknown": None, "c": 0.25}))
    assert {"plain", "a < b", "unknown", "c", "exact ↑"} <= set(texts)
    plain, more, less = dots[:3]  # what was not measured has no dot; the last three are the legend
    assert len(dots) == 6
    assert float(less["cx"]) < float(plain["cx"]) < float(more["cx"])
    assert float(more["cx"]) - float(plain["cx"]) == pytest.approx(float(plain["cx"]) - float(less["cx"]), abs=0.2)
    assert plain["fill"] == dots[3]["fill"] and more["fill"] == less["fill"] == dots[5]["fill"]


def test_the_whisker_of_a_picture_is_the_interval_of_the_difference():
    root = ElementTree.fromstring(picture(entry_of({"plain": 0.5, "method": 0.7})))
    _, whisker = [node.attrib for node in root.iter() if node.get("class") == "whisker"]
    dots = [float(node.get("cx")) for node in root.iter() if node.tag.endswith("circle")]
    scale = (dots[1] - dots[0]) / 0.2
    assert float(whisker["x1"]) == pytest.approx(dots[1] - 0.1 * scale, abs=0.3)
    assert float(whisker["x2"]) == pytest.approx(dots[1] + 0.1 * scale, abs=0.3)


def test_the_picture_of_a_sweep_is_a_curve_for_each_series():
    values = {"plain": 0.9} | {f"{name} 0.{i}": 0.1 * i for name in ("threshold", "credit") for i in range(1, 8)}
    found = entry_of(values, cost="forward_passes")
    root = ElementTree.fromstring(picture(found))
    curves = [node.get("points").split() for node in root.iter() if node.tag.endswith("polyline")]
    assert [len(points) for points in curves] == [1, 7, 7]
    texts, _ = shapes(found)
    assert texts.count("threshold") == texts.count("credit") == 1 and "forward passes for a sample" in texts
    across = [float(point.split(",")[0]) for point in curves[1]]
    up = [float(point.split(",")[1]) for point in curves[1]]
    assert across == sorted(across) and up == sorted(up, reverse=True)  # y counts downwards


def test_every_measured_method_has_evidence_with_controls():
    folder = ROOT / "docs" / "evidence"
    entries = {e["slug"]: e for e in load_evidence(folder)}
    measured = [name for entry in catalog.METHODS for name in entry.experiments]
    assert sorted(entries) == sorted(path.stem for path in folder.glob("*.json")) == sorted(measured)
    for name in measured:
        found = entries[name]
        assert found["verdict"] == verdict_in(found) in VERDICTS and measured_what(found)
        roles = {s["role"] for s in found["subjects"]}
        assert roles == {"plain", "control", "method"} and found["numbers"]["samples"] > 1
        assert found["findings"] and all(f["numbers"] for f in found["findings"])


def test_a_number_that_is_shown_is_one_that_decides():
    """Of several checks of a finding one that came out as the finding did."""
    checks = 0
    for found in load_evidence(ROOT / "docs" / "evidence"):
        for finding in found["findings"]:
            if number := finding["measured"]:
                text = re.escape(f"{number['what']}: {number['shown']} (")
                decided = rf"{text}[^()]*: {finding['outcome']}"
                assert re.search(decided, finding["numbers"]), (found["slug"], finding)
                checks += 1
    assert checks > 150


def test_a_cell_of_the_ledger_holds_at_most_one_number():
    """With its interval; the published one may say what it is compared with."""
    rows = ledger({e["slug"]: e for e in load_evidence(ROOT / "docs" / "evidence")}).splitlines()[2:]
    assert len(rows) == len(catalog.experiments())
    for row in rows:
        _, _, published, measured, *_ = row.split("|")
        assert re.fullmatch(r" ([-+]?[\d.]+%?( \[[-+\d.%]+, [-+\d.%]+\]| times)?)? ", measured), row
        assert len(published) < 80, row


def test_a_published_number_stands_beside_the_one_experiment_that_tests_it():
    for entry in catalog.METHODS:
        claim = entry.load().published
        shown = [name for name in entry.experiments if published_on(entry, name)]
        assert shown == ([claim.tested_by or entry.slug] if claim and entry.experiments else []), entry.slug


def test_blocks_must_exist():
    assert fill("a\n<!-- x -->\nold\n<!-- /x -->\n", "x", "new") == "a\n<!-- x -->\nnew\n<!-- /x -->\n"
    assert fill("a:\n  # <x>\n  # </x>\n", "x", "  - b") == "a:\n  # <x>\n  - b\n  # </x>\n"
    with pytest.raises(ValueError, match="block"):
        fill("no block", "x", "new")
