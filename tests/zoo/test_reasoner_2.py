"""zoo/reasoner-2: what it learns and with which weight, how it grows from zoo/reasoner, how doubts are counted."""

import re
from itertools import islice

import pytest
import torch

import tokenry
from tokenry.data.problems import Arithmetic, draw_problems, split_of
from tokenry.zoo import reasoner, reasoner_2


@pytest.fixture(scope="module")
def characters():
    return reasoner.build_tokenizer()


def test_places_behind_steps_are_those_where_wait_may_stand(characters):
    text = "<user>2+3-4=<assistant><think>\n2+3=6\nwait\n2+3=5\n5-4=1\ncheck\n2+3=5\n5-4=1\n</think>\n1"
    ids = characters.encode(text, add_special_tokens=False)
    found = characters.convert_ids_to_tokens([ids[i] for i in reasoner_2.behind_steps(characters, ids)])
    assert found == ["wait", "5", "check", "5", "</think>"]
    direct = characters.encode("<user>2+3-4= direct<assistant><think>\n5\n1\n</think>\n1", add_special_tokens=False)
    assert reasoner_2.behind_steps(characters, direct) == []


def test_what_is_behind_steps_weighs_more_and_judged_texts_teach_nothing_else(characters):
    lessons, kinds = reasoner_2.examples(characters, seed=5), {"judged": 0, "direct": 0, "solved": 0}
    for _ in range(300):
        ids, (weights, _) = next(lessons)
        text = characters.decode(ids)
        assert split_of(re.match(r"<user>([-+*\d]+=)", text)[1]) == "train"
        assert len(ids) == len(weights) and ids[-1] == characters.eos_token_id and weights[-1] == 1
        heavy = [i for i, weight in enumerate(weights) if weight == reasoner_2.PHASES[0].weight]
        places = reasoner_2.behind_steps(characters, ids)
        if text.endswith("<assistant>score=9<eos>") or text.endswith("<assistant>score=0<eos>"):
            kinds["judged"] += 1
            assert heavy[-1] == len(ids) - 2  # the score
            assert set(weights[:-2]) <= {0, reasoner_2.PHASES[0].weight}
            last = text.split("<eos>")[0].rstrip("\n").rsplit("\n", 1)[0] + "\n"  # all but the judged line
            assert all(i < len(characters.encode(last, add_special_tokens=False)) for i in heavy[:-1])
            assert set(heavy[:-1]) <= set(places)
        else:
            kinds["direct" if "direct" in text else "solved"] += 1
            assert heavy == places
            prompt = len(characters.encode(text.split("<think>\n")[0] + "<think>\n", add_special_tokens=False))
            assert set(weights[:prompt]) == {0} and 0 not in weights[prompt:]
    assert all(count > 15 for count in kinds.values())


def test_a_number_that_was_taken_over_wrongly_is_known(characters):
    """In a judged step the right first number and sign make the value that the step would have had."""
    lessons, misread = reasoner_2.examples(characters, seed=3), 0
    for _ in range(400):
        ids, (_, number) = next(lessons)
        text = characters.decode(ids)
        if not number:
            continue
        last = reasoner_2.STEP.fullmatch(text.split("<eos>")[0].rstrip("\n").rsplit("\n", 1)[1])
        assert text.endswith("score=9<eos>") <= (last[1] == number)
        if last[1] != number:
            misread += 1
            assert reasoner_2.rightly(last[0]) or last[4] == "0"  # what is wrong with it is that number alone
    assert misread > 20


def test_the_loss_is_a_weighted_mean_and_padding_is_not_seen(characters):
    model, _ = reasoner.untrained(0)
    weights = [0.0, 1.0, 0.0, 3.0, 1.0], [0.0, 2.0, 1.0]
    rows = list(zip([[5, 6, 7, 8, 9], [9, 10, 11]], weights))
    lessons = [(ids, reasoner_2.Lesson(its, "")) for ids, its in rows]
    batch = reasoner_2.Taught(model, characters).collate(lessons, 0)
    assert batch["weights"].tolist() == [[0, 1, 0, 3, 1], [0, 2, 1, 0, 0]]
    with torch.no_grad():
        found = reasoner_2.next_token_loss(model(batch["input_ids"]).logits, batch)
        total = 0.0
        for ids, weights in rows:
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total -= sum(w * logp[i, ids[i + 1]].item() for i, w in enumerate(weights[1:]))
    assert found.item() == pytest.approx(total / 8, rel=1e-4)


def test_digits_of_steps_are_compared_with_those_that_should_stand_there():
    tokens = [*"43-6=73", "\n", "wait", "\n", *"43-6=377", "\n", *"3-6=4", "\n", *"34-6=28", "\n", "1", "<eos>"]
    taken = [("4", 4, 4, False), ("3", 3, 3, False)]
    values = [
        [("7", 7, 3, True), ("3", 3, -100, True)],  # what should follow a wrong digit is not known
        [("3", 3, 3, False), ("7", 7, 7, False), ("7", 7, -100, True)],  # one digit too many
        [("4", 4, -100, True)],  # a value below zero has no digits here
        [("2", 2, 2, False), ("8", 8, 8, False)],
    ]
    begun = {"": [("3", 3, 3, False), ("4", 4, 4, False)], "43": [("3", 3, 4, True), ("4", 4, -100, True)]}
    for number, last in begun.items():
        found = [(tokens[one.place], *one[1:]) for one in reasoner_2.written_digits(tokens, number)]
        assert found == [*taken, *values[0], *taken, *values[1], taken[1], *values[2], *last, *values[3]]


def test_it_begins_as_the_reasoner_and_keeps_the_token():
    grown, tokenizer = reasoner_2.untrained(0)
    start, _ = tokenry.load("zoo/reasoner", device="cpu")
    first = grown.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(first[:, :160], start.model.layers[0].self_attn.q_proj.weight) and not first[:, 160:].any()
    text = "<user>12+35-8*3=<assistant><think>\n8*3=24\n12+35=47\n"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        out = grown(**ids, output_hidden_states=True)
        before = start(**ids).logits.softmax(-1)
    assert (out.logits.softmax(-1) - before).abs().max() < 0.2
    held = grown.get_input_embeddings().weight[ids.input_ids[0], 160:]
    assert all(torch.equal(states[0, :, 160:], held) for states in out.hidden_states[:-1])


def test_readers_are_not_part_of_the_model(characters):
    model, tokenizer = reasoner_2.untrained(0)
    taught = reasoner_2.Taught(model, tokenizer)
    rows = list(islice(reasoner_2.examples(tokenizer, 1), 4))
    batch = taught.collate(rows, 0)
    written = batch["input_ids"][batch["digits"][:, 0], batch["digits"][:, 1]]
    assert [int(tokenizer.decode(i)) for i in written] == batch["digits"][:, 2].tolist()
    taught.loss(batch).backward()
    assert taught.errors.weight.grad is not None and taught.digits.weight.grad.abs().sum() > 0
    assert not any("digits" in name or "errors" in name for name in model.state_dict())


def test_doubts_are_counted_step_by_step():
    text = "2+3=6\nwait\n2+3=5\n5-4=2\n2*3=6\nwait\n2*3=7\ncheck\n2+3=5\n</think>\n5"
    assert reasoner_2.doubted(text) == [
        (False, True, True),  # a wrong one, doubted and mended
        (True, False, False),
        (False, False, False),
        (True, True, False),
        (False, False, False),
        (True, False, False),
    ]
    assert reasoner_2.rightly("12-15=-3") is True and reasoner_2.rightly("12-15=3") is False
    assert reasoner_2.rightly("wait") is None


def test_shares_of_doubts_are_those_of_its_own_texts(monkeypatch):
    texts = ["2+3=6\nwait\n2+3=5\n</think>\n5", "2+3=6\n6-1=5\n</think>\n5", "1+1=2\nwait\n1+1=2\n</think>\n2"]
    monkeypatch.setattr(reasoner_2, "written", lambda model, tokenizer, problems: texts)
    found = reasoner_2.doubts(None, None, [])
    assert found == {
        "errs": pytest.approx(2 / 6),
        "doubts_wrong": 0.5,
        "doubts_right": 0.25,
        "doubts_ratio": 2.0,
        "mends": 1.0,
    }


def test_its_own_texts_are_solutions():
    """One to a problem, in order, whatever the batch."""
    model, tokenizer = tokenry.load("zoo/reasoner", device="cpu")
    problems = draw_problems(Arithmetic(), 3, split="dev", levels=(1,))
    texts = reasoner_2.written(model, tokenizer, problems)
    for problem, text in zip(problems, texts, strict=True):
        assert text.startswith(problem.question[:-1].split("+")[0].split("-")[0])
