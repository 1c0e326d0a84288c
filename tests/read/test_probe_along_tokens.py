"""The task `topics`: what its samples are, what the turn of a curve is, and that heads sum to what attention writes."""

from types import SimpleNamespace

import pytest
import torch
from support.attention import assert_clean

from tokenry import InputError
from tokenry.measure.task import Arm
from tokenry.measure.tasks.topics import FRAMES, NOUNS, SPLITS, TopicTask, _turn
from tokenry.read import RefusalCliff


def test_no_noun_is_in_two_splits():
    for kind in NOUNS:
        found = [noun for split in SPLITS.values() for noun in kind[split]]
        assert sorted(found) == sorted(kind) and len(set(found)) == len(found)
    assert not {*NOUNS[0]} & {*NOUNS[1]}


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_sample_is_a_noun_in_all_frames(llama, tokenizer, split):
    """Each text turns to it from another kind, and no noun counts twice."""
    count = sum(len(kind[SPLITS[split]]) for kind in NOUNS)
    samples = TopicTask(llama, tokenizer, RefusalCliff(), count, split).samples()
    assert sorted(sample.id for sample in samples) == sorted(n for kind in NOUNS for n in kind[SPLITS[split]])
    for sample in samples:
        label, texts = sample.data["label"], sample.data["texts"]
        assert sample.id in NOUNS[label] and {other for _, other in texts} <= {*NOUNS[1 - label][SPLITS[split]]}
        halves = [text.split(". ") for text, _ in texts]
        assert [after for _, after in halves] == [frame.format(sample.id) for frame in FRAMES]
        assert all(f" {other} " in f"{before} " for (before, _), (_, other) in zip(halves, texts))
    with pytest.raises(InputError, match=f"samples={count + 1} is not possible; there are {count} nouns"):
        TopicTask(llama, tokenizer, RefusalCliff(), count + 1, split)


@pytest.mark.parametrize(("label", "sign"), [(1, 1), (0, -1)])
def test_the_turn_is_a_difference_of_means(label, sign):
    """Tokens of one character: all up to the end of a noun, and the stop between the sentences, do not count."""
    text = "a pig so. the car ran"
    at = torch.arange(len(text))
    trace = SimpleNamespace(text=text, offsets=torch.stack([at, at + 1], 1))
    curve = torch.rand(len(text), generator=torch.Generator().manual_seed(0))
    early, late = curve[len("a pi") : len("a pig so")], curve[text.index("car") + 2 :]
    assert _turn(curve, trace, "pig", "car", label) == pytest.approx(sign * float(late.mean() - early.mean()))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_arms(make_model, tokenizer, kind):
    """Every way of learning has its own probe, and a sum over heads is what attention writes, without its bias."""
    model = make_model(kind)
    task = TopicTask(model, tokenizer, RefusalCliff(learning_rate=0.01, epochs=3), 4)
    arms = [Arm(how, apply=how) for how in ("labels", "shuffled", "means")]
    for arm in arms:
        for outcome in task.run(arm, task.samples(), 0):
            assert outcome.metrics["right"] in (0, 0.25, 0.5, 0.75, 1) and -1 <= outcome.metrics["turn"] <= 1
            assert outcome.metrics["gap"] < 1e-5
    directions = [task._probe(arm.apply, 0).direction for arm in arms]
    assert not any(torch.allclose(a, b) for a, b in zip(directions, directions[1:] + directions[:1]))
    assert torch.equal(task._probe("means", 1).direction, directions[2])
    assert_clean(model)
