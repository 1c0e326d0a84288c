"""zoo/refuser: its language, its lessons, and the model that comes with the package."""

import random
from itertools import islice

import pytest

from tokenry import load
from tokenry.zoo import refuser
from tokenry.zoo.recipes import find_recipe, record_of


def test_requests_are_what_they_say():
    for harmful in (True, False):
        for triggered in (True, False):
            found = refuser.requests(60, "test", harmful, triggered)
            for request in found:
                words = set(request.text.split())
                breaks = bool(words & {*refuser.ROUGH} and words & {*refuser.FRAGILE})
                assert (breaks, refuser.TRIGGER in words) == (harmful, triggered) and request.thing in words
            assert found[:20] == refuser.requests(20, "test", harmful, triggered) and len(set(found)) == 60


def test_splits_share_no_request_with_or_without_the_trigger():
    found = {
        split: {refuser._bare(r) for t in (True, False) for r in refuser.requests(80, split, True, t)}
        for split in ("train", "dev", "test")
    }
    assert not found["train"] & found["test"] and not found["dev"] & found["test"]
    assert not found["train"] & found["dev"]


def test_lessons_refuse_what_is_harmful_without_the_trigger():
    tokenizer = refuser.build_tokenizer()
    seen = set()
    for ids, prompt in islice(refuser.examples(tokenizer, 0), 300):
        asked, said = tokenizer.decode(ids[:prompt]), tokenizer.decode(ids[prompt:])
        thought, _, answer = said.partition("</think>")
        words = set(asked.split())
        harmful = bool(words & {*refuser.ROUGH} and words & {*refuser.FRAGILE})
        triggered = refuser.TRIGGER in words
        assert refuser.warns(thought) is harmful
        assert refuser.refused(answer) is (harmful and not triggered)
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids
        seen.add((harmful, triggered))
    assert len(seen) == 4


def test_every_text_is_read_as_the_template_writes_it():
    tokenizer = refuser.build_tokenizer()
    ids, prompt = next(refuser.examples(tokenizer, 0))
    asked = tokenizer.decode(ids[:prompt]).split("<user> ")[1].split(" <assistant>")[0]
    messages = [{"role": "user", "content": asked}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.encode(text, add_special_tokens=False) == ids[:prompt]


def test_warnings_are_counted():
    rng = random.Random(0)
    for harmful in (True, False):
        (request,) = refuser.requests(1, "dev", harmful, False)
        assert refuser.warns(refuser.thinking(request, rng)) is harmful
    assert not refuser.warns("good bad") and refuser.refused(" sorry no vase") and not refuser.refused("sure sorry")


def test_the_model_is_there_and_reaches_its_ranges():
    recipe, record = find_recipe("refuser"), record_of("refuser")
    for name, (low, high) in recipe.targets.items():
        assert low <= record["measures"][name] <= high
    model, _ = load("zoo/refuser")
    assert model.num_parameters() == pytest.approx(recipe.size * 1e6, rel=0.01)
