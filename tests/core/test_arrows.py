"""What import-linter does not see: a stage that reaches another one through the catalogue or in its exports, circles of
types, and methods that import each other."""

import ast
from graphlib import CycleError, TopologicalSorter
from itertools import permutations
from pathlib import Path

import grimp
import pytest

import tokenry
from tokenry.catalog import METHODS, STAGES

ROOT = Path(tokenry.__file__).parent
FILES = [file for stage in STAGES for file in sorted((ROOT / stage).rglob("*.py*")) if file.suffix in (".py", ".pyi")]


def reached(file):
    """What a file imports from this package, as dotted names below it."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level]
            yield from (".".join([*base, *filter(None, [node.module]), name.name]) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "tokenry":
            yield from (f"{node.module}.{name.name}".removeprefix("tokenry.") for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (n.name.removeprefix("tokenry.") for n in node.names if n.name.split(".")[0] == "tokenry")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_reaches_no_other_stage_and_not_the_catalogue(stage):
    files = [file for file in FILES if file.relative_to(ROOT).parts[0] == stage]
    assert len(files) > 2
    foreign = {*STAGES, "catalog"} - {stage}
    for file in files:
        found = {name for name in reached(file) if name.split(".")[0] in foreign}
        assert not found, f"{file.relative_to(ROOT)} reaches {sorted(found)}"


def test_what_is_forbidden_is_seen(tmp_path, monkeypatch):
    code = "from .. import catalog\nfrom ..decode.learn2pd import x\nimport tokenry.read\n"
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "m.py").write_text(code)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert set(reached(tmp_path / "train" / "m.py")) == {"catalog", "decode.learn2pd.x", "read"}


# --- circles and methods ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imports():
    """Who imports whom, for types alone too."""
    return grimp.build_graph("tokenry", exclude_type_checking_imports=False, cache_dir=None)


def circle(imports):
    """Modules that import each other in a loop, or None."""
    try:
        TopologicalSorter({m: imports.find_modules_directly_imported_by(m) for m in imports.modules}).prepare()
    except CycleError as found:
        return found.args[1]


def test_no_module_imports_itself_by_way_of_others(imports):
    assert circle(imports) is None


def test_a_circle_is_seen():
    imports = grimp.ImportGraph()
    for pair in [("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]:
        imports.add_import(importer=pair[0], imported=pair[1])
    assert set(circle(imports)) == {"a", "b", "c"}


@pytest.mark.parametrize("stage", STAGES)
def test_no_method_imports_another_one(stage, imports):
    names = {file.stem for file in (ROOT / stage).glob("*.py")} - {"__init__", "contract", "api", "adapters"}
    methods = sorted(f"tokenry.{stage}.{name}" for name in names)
    assert {entry.target.split(":")[0] for entry in METHODS if entry.stage == stage} <= set(methods)
    chains = [imports.find_shortest_chain(importer=a, imported=b) for a, b in permutations(methods, 2)]
    assert not [chain for chain in chains if chain]
