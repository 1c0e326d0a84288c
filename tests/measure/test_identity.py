"""What a run is: other weights, another tokenizer, task, setting, version or revision is another run."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from click.testing import CliRunner
from support.comparing import Roots
from support.comparing import experiment as roots

from tokenry.cli import main
from tokenry.data.problems import Arithmetic, draw_problems
from tokenry.data.puzzles import Sorting
from tokenry.decode.denoising.loop import MaskedDiffusionModel
from tokenry.measure import compare as measured
from tokenry.measure.build_cache import kept_folder
from tokenry.measure.compare import compare, identity, made_of
from tokenry.measure.ledger import evidence
from tokenry.measure.store import RunStore, signature
from tokenry.measure.task import Sample
from tokenry.measure.tasks.arithmetic import ArithmeticTask
from tokenry.measure.tasks.denoising import PuzzleTask
from tokenry.measure.tasks.difficulty import DifficultyTask
from tokenry.measure.tasks.reflection import ReflectionTask
from tokenry.measure.tasks.stories import StoriesTask
from tokenry.measure.tasks.sts import Pair, STSTask
from tokenry.measure.tasks.tokens import TokensTask
from tokenry.models.anatomy import fingerprint
from tokenry.models.prompts import tokenizer_hash


class Set(Roots):
    """The same samples, another setting."""

    setting: ClassVar[dict] = {"steps": 7}


class Moved(Roots):
    """Samples of the same names with something else in them."""

    def samples(self):
        return [Sample(s.id, s.prompt, {"n": s.data["n"] + 100}) for s in super().samples()]


@pytest.fixture
def other(llama):
    """The same architecture with one number in a weight that is another one."""
    changed = copy.deepcopy(llama)
    with torch.no_grad():
        changed.lm_head.weight.view(-1)[0] += 1.0
    return changed


@pytest.fixture
def retrained(tokenizer):
    """The same vocabulary, one merge less."""
    return tokenizer.train_new_from_iterator(["a lighthouse by the sea"] * 3, 319)


def again(tmp_path, first, second):
    """How many batches the second run measures that resumes the first; each is (experiment, about)."""
    with RunStore(tmp_path / "runs.sqlite") as store:
        compare(first[0], store, about=first[1])
        compare(second[0], store, about=second[1], resume=True)
    return len(second[0].task.log)


def test_the_same_is_resumed(tmp_path, llama, tokenizer):
    about = {"model": "m", **made_of(llama, tokenizer)}
    assert again(tmp_path, (roots(), about), (roots(Roots()), {**about})) == 0


@pytest.mark.parametrize(
    "change",
    ["weights", "tokenizer", "setting", "samples", "revision", "further model", "version"],
)
def test_what_changed_is_measured_again(tmp_path, llama, other, tokenizer, retrained, monkeypatch, change):
    """The model is called the same every time."""
    first = roots(), {"model": "m", **made_of(llama, tokenizer)}
    second = {
        "weights": lambda: (roots(Roots()), {"model": "m", **made_of(other, tokenizer)}),
        "tokenizer": lambda: (roots(Roots()), {"model": "m", **made_of(llama, retrained)}),
        "setting": lambda: (roots(Set()), first[1]),
        "samples": lambda: (roots(Moved()), first[1]),
        "revision": lambda: (replace(roots(Roots()), revision=2), first[1]),
        "further model": lambda: (replace(roots(Roots()), models={"drafter": other}), first[1]),
        "version": lambda: (roots(Roots()), first[1]),
    }[change]()
    with RunStore(tmp_path / "runs.sqlite") as store:
        compare(first[0], store, about=first[1])
        if change == "version":
            monkeypatch.setattr(measured, "version", lambda name: "999")
        compare(second[0], store, about=second[1], resume=True)
    assert len(second[0].task.log) == 12


def test_an_old_store_is_read_and_not_resumed(tmp_path):
    with RunStore(tmp_path / "runs.sqlite") as store:
        run = store.begin({"experiment": "roots", "task": "roots", "subjects": {}})
        task = Roots()
        compare(roots(task), store, resume=True)
        assert store.outcomes(run) == {} and len(task.log) == 12


def test_the_evidence_says_what_was_measured(llama, tokenizer):
    comparison = compare(roots(Set()), about=made_of(llama, tokenizer))
    found = evidence(comparison, comparison.experiment.findings(comparison), model="m", command="c")["identity"]
    assert found["task"] == {"name": Roots.slug, "steps": 7} and found["revision"] == 1
    assert {"weights", "tokenizer", "tokenry"} <= set(found) and "subjects" not in found


def test_a_tokenizer_is_the_same_after_use(tokenizer):
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "a long text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_hash(tokenizer) == before
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = "{{ messages }}"
    assert tokenizer_hash(changed) != before


def test_what_is_kept_is_kept_for_these_weights(llama, other, tokenizer, retrained, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENRY_CACHE", str(tmp_path))
    folders = [
        kept_folder("x", llama, tokenizer),
        kept_folder("x", other, tokenizer),
        kept_folder("x", llama, retrained),
        kept_folder("x", llama, tokenizer, revision=2),
        kept_folder("x", llama, tokenizer, drafter=other),
        kept_folder("y", llama, tokenizer),
    ]
    assert len(set(folders)) == len(folders) and folders[0] == kept_folder("x", llama, tokenizer)


TASKS = {
    "sums": (
        ArithmeticTask,
        {"problems": draw_problems(Arithmetic(), 2)},
        [{"drawn": 3}, {"problems": draw_problems(Arithmetic(), 2, seed=1)}],
    ),
    "stories": (StoriesTask, {"patterns": ["a"], "count": 2}, [{"patterns": ["b"]}, {"max_new_tokens": 9}]),
    "reflection": (ReflectionTask, {"token_ids": [3], "count": 2}, [{"token_ids": [4]}, {"period": 50.0}]),
}
ALONE = {
    "sts": (STSTask, {"pairs": [Pair("a", "b", 1.0)]}, [{"pairs": [Pair("a", "b", 2.0)]}]),
    "tokens": (
        TokensTask,
        {"sets": {"licenses": ["a b"]}, "new": [True], "clean": ["c"]},
        [{"error_rate": 0.1}, {"new": [False]}, {"clean": ["d"]}],
    ),
    "difficulty": (
        DifficultyTask,
        {"task": Arithmetic(), "problems": draw_problems(Arithmetic(), 2)},
        [{"problems": draw_problems(Arithmetic(), 2, seed=1)}, {"task": Sorting()}],
    ),
}


def told(task):
    """All that the store knows of a task."""
    known = identity(replace(roots(), task=task))
    return signature(known), tuple(sample.key for sample in task.samples())


@pytest.mark.parametrize("name", [*TASKS, *ALONE])
def test_every_argument_of_a_task_is_part_of_what_it_is(name, llama, tokenizer):
    kind, given, changes = {**TASKS, **ALONE}[name]
    models = (llama, tokenizer) if name in TASKS else ()
    same, again = (told(kind(*models, **given)) for _ in range(2))
    assert same == again
    assert all(told(kind(*models, **{**given, **change})) != same for change in changes)


def test_the_window_of_puzzles_is_part_of_what_they_are():
    from support.denoisers import Characters, small

    model = small()
    assert MaskedDiffusionModel(model)
    made = {
        told(PuzzleTask(model, Characters(), (0,), 4, **change))
        for change in ({}, {"width": 8}, {"kinds": (Sorting(),)}, {"split": "dev"})
    }
    assert len(made) == 4


def test_the_command_line_measures_other_weights_again(tmp_path, monkeypatch, llama, other, tokenizer):
    """A folder of the same name, whose weights have changed in between. The record says which they were."""
    monkeypatch.chdir(tmp_path)
    folder, store, weights = tmp_path / "model", tmp_path / "runs.sqlite", []
    command = ["compare", "antislop", "--samples", "1", "--model", str(folder), "--store", str(store), "--resume"]
    for model in (llama, llama, other):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        result = CliRunner().invoke(main, [*command, "--record"])
        assert result.exit_code == 0, result.output
        weights.append(json.loads(Path("docs/evidence/antislop.json").read_text())["identity"]["weights"])
    assert weights == [fingerprint(llama), fingerprint(llama), fingerprint(other)]
    verdict = json.loads(Path("docs/evidence/antislop.json").read_text())["verdict"]
    assert verdict in Path("docs/evidence/antislop.html").read_text()  # the report lies beside the record
    with RunStore(store) as kept:
        assert [row[0] for row in kept.db.execute("SELECT count(*) FROM runs")] == [2]
