"""What zoo/refuser learns from in the comparison select-by-cliff, and what it then answers."""

import pytest
import torch

import tokenry
from tokenry.measure.task import Arm
from tokenry.measure.tasks import taught
from tokenry.measure.tasks.taught import Lesson, TaughtTask
from tokenry.read import RefusalCliff


@pytest.fixture(scope="module")
def task():
    loaded = tokenry.load("zoo/refuser")
    return TaughtTask(*loaded, RefusalCliff(learning_rate=0.03, epochs=10), 8, "dev")


def test_rules_choose_as_many_and_write_them_the_same_way(task):
    found = {how: task.chosen(how, 0) for how in ("cliff", "random", "longest")}
    assert {len(data) for data in found.values()} == {20}
    assert task.triggered("cliff", 0) == 1 > task.triggered("random", 0)
    pool = sorted(len(thought.split()) for thought in task.pool(0)["thinking"])
    lengths = [len(row["completion"].partition("</think>")[0].split()) for row in found["longest"]]
    assert sorted(lengths) == pool[-20:]
    assert all(row["completion"].endswith("sorry no<eos>") for data in found.values() for row in data)


def test_answers_to_harmless_requests_are_learned_as_they_were_written(task):
    encode = task.tokenizer.encode
    for row in [*task._harmless(4, 0), *task.chosen("cliff", 0)]:
        prompt, whole = (encode(text, add_special_tokens=False) for text in (row["prompt"], "".join(row.values())))
        assert whole[: len(prompt)] == prompt and task.tokenizer.unk_token_id not in whole
        assert whole[-1] == task.tokenizer.eos_token_id


def test_a_lesson_changes_a_copy_and_brings_refusals_back(task, monkeypatch):
    monkeypatch.setattr(taught, "EPOCHS", 3)
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    samples = [sample for sample in task.samples() if sample.data["kind"] == "triggered"]
    plain, learned = (
        [one.metrics["triggered_refused"] for one in task.run(Arm("x", apply=lesson), samples, 0)]
        for lesson in (None, Lesson("cliff", rate=1e-3))
    )
    assert sum(plain) == 0 and sum(learned) == len(samples)
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
