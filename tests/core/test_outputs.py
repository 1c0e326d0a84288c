"""Where results go: nobody's file is lost, nothing half-written is left, and what cannot be written is refused before
the work."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.core.outputs import (
    LineWriter,
    check_file,
    check_folder,
    write_artifact,
    write_file,
    write_folder,
    write_text,
)
from tokenry.learned.difficulty_probe import DifficultyProbe
from tokenry.zoo import building, recipes

NEEDS_FORCE = "add --force"


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A small model, saved."""
    from support.families import build

    place = tmp_path_factory.mktemp("models") / "tiny"
    build("llama").save_pretrained(place)
    tokenizer.save_pretrained(place)
    results = [{"question": "1+1?", "level": level, "accuracy": 1, "tokens": 9 + level} for level in (0, 1)]
    (place / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in results))
    return str(place)


@pytest.fixture
def texts(tmp_path):
    """Files that the verbs read."""
    (tmp_path / "in.txt").write_text("the sea\nthe wind\n" * 40)
    rows = [{"prompt": "1+1?", "solutions": ["so \\boxed{2}", "so \\boxed{3}"], "answer": "2"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(map(str, args)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def tiny(folder: str, *args: object) -> list[object]:
    return [*args, "--model", folder]


def commands(folder: str, texts: Path) -> dict[str, tuple[list[object], str]]:
    """Every option that names an output, in a command that works: {verb option: (arguments, option)}."""
    decode = [
        "decode",
        "the old",
        "--raw",
        "--max-new-tokens",
        8,
        "--method",
        "antislop",
        "-o",
        'regexes=["[a-z]"]',
        "-o",
        "max_span=2",
    ]
    return {
        "decode --save-pairs": (tiny(folder, *decode), "--save-pairs"),
        "judge --pairs": (tiny(folder, "judge", texts / "rows.jsonl", "--method", "crew", "--raw"), "--pairs"),
        "represent --output": (tiny(folder, "represent", texts / "in.txt"), "--output"),
        "fit --save": (tiny(folder, "fit", "lm-head-neurons"), "--save"),
        "judge --report": (["judge", Path(folder) / "results.jsonl", "--method", "arise"], "--report"),
        "read --report": (
            tiny(folder, "read", "the old", "--method", "lm-head-neurons", "-o", "min_prob=0"),
            "--report",
        ),
        "tokenize report --html": (["tokenize", "report", folder, "--text", texts / "in.txt"], "--html"),
    }


FILES = tuple(commands("", Path()))
SUFFIX = {"represent --output": ".npy"}
KNOWN_AS_OURS = ("tokenize report --html", "read --report", "judge --report", "fit --save")
MEASURED_ELSEWHERE = {"compare --report", "compare --picture", "compare --store"}  # need an experiment, see below
PROFILED_ELSEWHERE = {"profile --output", "profile --save-texts"}  # see test_overused.py
TRACED_ELSEWHERE = {"decode --save-traces"}  # needs a masked-diffusion model, see test_train_learn2pd.py
FOLDERS = {"judge --save", "tokenize train --output", "train --output", "zoo build --output"}


def test_every_option_that_names_an_output_is_tried_here():
    named = set()

    def walk(command: click.Command, path: str) -> None:
        for name, child in getattr(command, "commands", {}).items():
            walk(child, f"{path} {name}".strip())
        for option in command.params:
            longest = max(option.opts, key=len)
            words = (option.help or "").split() if isinstance(option, click.Option) else []
            if words[:1] == ["Write"] or any(w in longest for w in ("output", "save", "html", "pairs", "store")):
                named.add(f"{path} {longest}")
            if f"{path} {longest}" in named and longest not in ("--store", "--force", "--record"):
                assert any(o.name == "force" for o in command.params), f"{path} writes and has no --force"

    walk(main, "")
    switches = {name for name in named if name.endswith(("--force", "--record"))}
    assert named - switches == {*FILES, *FOLDERS, *MEASURED_ELSEWHERE, *TRACED_ELSEWHERE, *PROFILED_ELSEWHERE}


@pytest.mark.parametrize("name", FILES)
def test_files_of_others_stay(name, folder, texts):
    args, option = commands(folder, texts)[name]
    mine = texts / f"thesis{SUFFIX.get(name, '.jsonl')}"
    mine.write_text("years of work")
    code, said = run(*args, option, mine)
    assert code == 2 and NEEDS_FORCE in said and mine.read_text() == "years of work"
    code, _ = run(*args, option, mine, "--force")
    assert code == 0 and mine.read_bytes() != b"years of work"
    before = mine.read_bytes()
    code, said = run(*args, option, mine)  # pages and tensors are known as ours
    assert code == (0 if name in KNOWN_AS_OURS else 2), said
    assert mine.read_bytes() == before or code == 0
    assert sorted(p.name for p in texts.iterdir()) == sorted(["in.txt", "rows.jsonl", mine.name])


@pytest.mark.parametrize("name", FILES)
def test_a_refused_run_changes_nothing(name, folder, texts):
    args, option = commands(folder, texts)[name]
    suffix = SUFFIX.get(name, ".jsonl")
    empty, old, new, link = (texts / f"{n}{suffix}" for n in ("empty", "old", "new", "link"))
    empty.touch()
    old.write_text("old")
    link.symlink_to(old)
    wrong = [str(a).replace(folder, str(texts / "nofolder")) for a in args]
    for target in (empty, old, new, link):
        code, said = run(*wrong, option, target, "--force")
        assert code == 2 and "nofolder" in said
    assert empty.read_bytes() == b"" and old.read_text() == "old" and link.is_symlink() and not new.exists()


@pytest.mark.parametrize("name", FILES)
def test_places_that_cannot_be_written_are_refused_before_the_work(name, folder, texts):
    args, option = commands(folder, texts)[name]
    wrong = [str(a).replace(folder, str(texts / "nofolder")) for a in args]  # would be refused by what comes later
    suffix = SUFFIX.get(name, ".jsonl")
    (texts / "file").touch()
    (texts / f"loop{suffix}").symlink_to(texts / f"loop{suffix}")
    (texts / f"folder{suffix}").mkdir()
    for place in (f"none/x{suffix}", f"file/x{suffix}", f"loop{suffix}", f"folder{suffix}", "n" * 300 + suffix):
        code, said = run(*wrong, option, texts / place)
        assert code == 2 and "the output" in said and "nofolder" not in said, place


@pytest.mark.parametrize("name", FILES)
def test_links_are_followed_and_devices_stay_devices(name, folder, texts):
    args, option = commands(folder, texts)[name]
    suffix = SUFFIX.get(name, ".jsonl")
    real, link = texts / f"real{suffix}", texts / f"link{suffix}"
    link.symlink_to(real)  # dangling
    code, said = run(*args, option, link)
    assert code == 0, said
    assert link.is_symlink() and real.is_file() and not real.is_symlink()
    for device, expected in (("/dev/null", 0), ("/dev/full", 2)):
        way = texts / f"{Path(device).name}{suffix}"
        way.symlink_to(device)
        code, said = run(*args, option, way)
        assert code == expected and stat.S_ISCHR(os.stat(device).st_mode) and way.is_symlink(), said
        assert expected == 0 or "cannot be written (No space left on device)" in said.replace("\n", " ")


def test_a_folder_of_a_model_is_not_a_place_for_a_tokenizer(folder, texts):
    small = ["-o", "vocab_size=600", "-o", "custom_tokens=none"]
    args = ["tokenize", "train", "--method", "kl3m", texts / "in.txt", *small, "--output"]
    before = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
    code, said = run(*args, folder)
    assert code == 2 and NEEDS_FORCE in said
    assert {file.name: file.read_bytes() for file in Path(folder).iterdir()} == before
    assert run(*args, texts / "new")[0] == 0 and run(*args, texts / "new")[0] == 0  # its own is replaced
    (texts / "new" / "thesis.txt").write_text("years of work")
    assert run(*args, texts / "new")[0] == 2
    assert run(*args, texts / "new", "--force")[0] == 0
    assert (texts / "new" / "thesis.txt").read_text() == "years of work"


def test_other_folders_are_refused_before_the_work(texts):
    place = texts / "mine"
    place.mkdir()
    (place / "thesis.txt").write_text("years of work")
    for args in (
        ["train", "--method", "ftpo", "--data", texts / "rows.jsonl", "--output", place],
        ["fit", "difficulty-probe", "--data", "arithmetic:3", "--save", place],
        ["zoo", "build", "storyteller", "--output", place],
    ):
        code, said = run(*args)
        assert code == 2 and NEEDS_FORCE in said and [p.name for p in place.iterdir()] == ["thesis.txt"], args


def test_building_a_model_leaves_other_files_alone(tmp_path, monkeypatch, make_model, tokenizer):
    class Recipe:
        train = staticmethod(lambda seed, progress: (make_model("llama"), tokenizer))
        measure = staticmethod(lambda model, tokenizer: {"loss": 1.0})

    recipe = recipes.Recipe("tiny", "", "", 0.1, 1, {"loss": (0, 2)})
    monkeypatch.setattr(recipes, "RECIPES", (recipe,))
    monkeypatch.setattr(recipes.Recipe, "load", lambda self: Recipe)
    monkeypatch.setattr(building, "save", lambda loaded, folder: tokenizer.save_pretrained(folder))
    monkeypatch.setattr(building, "load", lambda *_, **__: (None, None))
    place = tmp_path / "built"
    building.build("tiny", place)
    (place / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        building.build("tiny", place)
    (place / "notes.txt").unlink()
    building.build("tiny", place)
    assert json.loads((place / "recipe.json").read_text())["measures"] == {"loss": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["built"]


# --- the pieces ------------------------------------------------------------------------------------------------------


def test_an_error_leaves_the_old_file(tmp_path):
    place = tmp_path / "x"
    place.write_text("old")

    def fails(part: Path) -> None:
        part.write_text("half")
        raise OSError(28, "No space left on device")

    for write in (write_file, lambda path, save: write_folder(tmp_path / "new", lambda part: fails(part / "y"))):
        with pytest.raises(InputError, match="No space left"):
            write(place, fails)
    assert place.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x"]
    with pytest.raises(ZeroDivisionError):  # other errors are not explained away
        write_file(place, lambda part: 1 / 0)


def test_modes_stay_and_new_files_obey_the_mask(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("x")
    old.chmod(0o640)
    write_text(old, "y")
    write_text(new, "y")
    mask = os.umask(0)
    os.umask(mask)
    assert (old.stat().st_mode & 0o777, new.stat().st_mode & 0o777) == (0o640, 0o666 & ~mask)


def test_a_manifest_reaches_nothing_outside_its_folder(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    place = tmp_path / "made"
    write_folder(place, lambda part: (part / "a").write_text("1"))
    (place / "tokenry.json").write_text(json.dumps({"files": ["a", "../thesis.txt", str(tmp_path / "thesis.txt")]}))
    write_folder(place, lambda part: (part / "b").write_text("2"))
    assert (tmp_path / "thesis.txt").exists() and sorted(p.name for p in place.iterdir()) == ["b", "tokenry.json"]
    for broken in ("[]", "{", '{"files": 3}', '{"files": [[]]}'):
        (place / "tokenry.json").write_text(broken)
        with pytest.raises(InputError, match="holds other files"):
            check_folder(place)


def test_lines_stand_when_the_context_ends(tmp_path):
    place = tmp_path / "rows.jsonl"
    place.write_text("old\n")
    with pytest.raises(KeyboardInterrupt), LineWriter(place):
        raise KeyboardInterrupt
    assert place.read_text() == "old\n"
    with pytest.raises(KeyboardInterrupt), LineWriter(place) as lines:
        lines.add([{"a": "é"}, 2])
        assert place.read_text() == "old\n"
        raise KeyboardInterrupt
    assert place.read_text(encoding="utf-8") == '{"a": "é"}\n2\n'
    with LineWriter(place):
        pass
    assert place.read_text() == "" and [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


WRITES_OFTEN = """
import sys
import numpy as np
from safetensors.numpy import save_file
from tokenry.core.outputs import write_file, write_folder

path, value = sys.argv[1], int(sys.argv[2])
tensors = {"a": np.full(50_000, value)}
for _ in range(20):
    write_file(path, lambda part: save_file(tensors, part))
    write_folder(path + ".d", lambda part: (part / "a").write_text(str(value) * 1000))
"""


def test_two_writers_never_mix(tmp_path):
    place = str(tmp_path / "kept.safetensors")
    writers = [subprocess.Popen([sys.executable, "-c", WRITES_OFTEN, place, str(value)]) for value in (1, 2)]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if Path(place).exists():
            seen.add(tuple(load_file(place)["a"].unique().tolist()))
    assert [writer.returncode for writer in writers] == [0, 0] and seen <= {(1,), (2,)}
    assert len(set((Path(place + ".d") / "a").read_text())) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.safetensors", "kept.safetensors.d"]


def test_artifacts_are_written_whole(tmp_path):
    write_artifact(tmp_path / "a", {"x": torch.ones(2)}, {"format": 1}, ("w.safetensors", "h.json"))
    before = (tmp_path / "a" / "w.safetensors").read_bytes()
    with pytest.raises(TypeError):  # no JSON: the weights stay, too
        write_artifact(tmp_path / "a", {"x": torch.zeros(2)}, {"format": object()}, ("w.safetensors", "h.json"))
    assert (tmp_path / "a" / "w.safetensors").read_bytes() == before
    probe = DifficultyProbe(4)
    probe.made_for = {"model": "m"}
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        probe.save(tmp_path / "file")


def test_a_place_may_be_empty_new_or_ours(tmp_path):
    np.save(tmp_path / "v.npy", np.zeros(2))
    (tmp_path / "empty").touch()
    assert check_file(tmp_path / "new") == tmp_path / "new" and check_file(tmp_path / "empty").exists()
    with pytest.raises(InputError, match="exists already"):
        check_file(tmp_path / "v.npy")
    check_file(tmp_path / "v.npy", force=True)
    check_folder(tmp_path / "far" / "away")
    assert not (tmp_path / "far").exists()
    with pytest.raises(InputError, match="is a file; give a folder"):
        check_folder(tmp_path / "v.npy", force=True)


def test_a_full_standard_output_is_one_sentence():
    command = [sys.executable, "-m", "tokenry", "list"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert (
        done.stderr.strip()
        == "Error: standard output cannot be written (No space left on device); write somewhere else"
    )
