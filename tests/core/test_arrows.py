"""No stage reaches another one behind the back of import-linter: through the catalogue, or in its exports."""

import ast
from pathlib import Path

import pytest

import tokenry
from tokenry.catalog import STAGES

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
