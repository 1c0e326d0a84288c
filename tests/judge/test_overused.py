"""Lists of what a model overuses: the rules on texts made by hand, the command, and the list of the package."""

import json
from importlib.resources import files

import pytest
import torch
from click.testing import CliRunner

from tokenry import InputError, generate
from tokenry.cli import main
from tokenry.data import builtin_phrases
from tokenry.decode import Antislop
from tokenry.judge import Overused, overused
from tokenry.text.words import STOP_WORDS, fold, words

PROMPTS = [f"Write about {topic}." for topic in ("a ship", "a bakery", "an old tower", "the labyrinthine post")]
FILLER = "We went there on a Monday and it was a good day for all of us."
TEXTS = [
    f"{FILLER} A labyrinthine tapestry of {extra} bustling streets, and the whispering willows sang. We couldn't stay."
    for extra in ("wet", "dry", "dull", "long")
]


def found(prompts, texts, most_words=10, most_phrases=10):
    return overused(prompts, texts, most_words, most_phrases)


def test_what_several_prompts_bring_out_is_listed_with_its_counts():
    listed = found(PROMPTS, TEXTS)
    assert Overused("tapestry", 4, 4) in listed and Overused("bustling", 4, 4) in listed
    texts = [entry.text for entry in listed]
    assert "whispering willows" in texts or {"whispering", "willows"} <= set(texts)
    assert "couldn" not in texts  # half of a word
    assert "labyrinthine" not in texts  # a word of a prompt


def test_a_topic_of_few_prompts_is_left_out():
    assert found(["Write about a ship."] * 4, TEXTS) == []
    assert found(PROMPTS[:2] * 2, TEXTS) == []


def test_what_holds_another_entry_is_left_out():
    texts = [entry.text for entry in found(PROMPTS, TEXTS)]
    split = [set(text.split()) for text in texts]
    assert not any(a < b for a in split for b in split)


def test_every_text_has_a_prompt():
    with pytest.raises(InputError, match="there are 3 prompts and 4 texts"):
        found(PROMPTS[:3], TEXTS)


def test_the_most_of_each_kind():
    kept = found(PROMPTS, TEXTS, most_words=1, most_phrases=0)
    assert len(kept) == 1 and " " not in kept[0].text


# --- the command ---------------------------------------------------------------------------------------------------


def run(*args):
    return CliRunner().invoke(main, ["profile", *map(str, args)])


def test_texts_of_any_model_are_profiled(tmp_path):
    rows = [json.dumps({"prompt": p, "text": t, "strategy": "x"}) for p, t in zip(PROMPTS, TEXTS)]
    for name, part in (("a.jsonl", rows[:2]), ("b.jsonl", rows[2:])):
        (tmp_path / name).write_text("\n".join(part))
    both = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    listed = json.loads(run(*both, "--json").stdout)
    assert listed[0].keys() == {"text", "prompts", "texts"}
    assert run(*both).stdout.split("\n")[:-1] == [entry["text"] for entry in listed]
    assert run(*both, "--output", tmp_path / "slop.txt").exit_code == 0
    assert run(*both, "--output", tmp_path / "slop.txt").exit_code == 2  # it is there
    assert list(Antislop(phrases=tmp_path / "slop.txt").phrases) == [entry["text"] for entry in listed]


@pytest.mark.parametrize(
    ("line", "more", "sentence"),
    [
        ('{"text": "x"}', (), "line 1 of"),
        ('{"prompt": "x", "text": "only this"}', (), "1 texts overuse nothing to several prompts"),
        ('{"prompt": "x", "text": "y"}', ("--draws", 2), "--draws would have no effect with TEXTS"),
    ],
)
def test_it_refuses(tmp_path, line, more, sentence):
    (tmp_path / "texts.jsonl").write_text(line)
    result = run(tmp_path / "texts.jsonl", *more)
    assert result.exit_code == 2 and sentence in result.stderr


def test_a_model_writes_its_own_texts(make_model, tokenizer, tmp_path):
    make_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("the sea\nthe cliff\n")
    model = ["--model", tmp_path / "model", "--prompts", tmp_path / "prompts.txt", "--max-new-tokens", 3]
    run(*model, "--draws", 2, "--save-texts", tmp_path / "texts.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the sea", "the cliff"] * 2
    assert [row["text"] for row in rows[:2]] != [row["text"] for row in rows[2:]]


# --- the list of the package ---------------------------------------------------------------------------------------


def test_the_list_has_entries_each_once_and_none_of_ordinary_words():
    listed = builtin_phrases("en")
    assert 200 < len(listed) < 1000
    assert len({fold(entry) for entry in listed}) == len(listed) and listed == [fold(entry) for entry in listed]
    for entry in listed:
        assert any(word.text not in STOP_WORDS and len(word.text) >= 3 for word in words(entry)), entry
    head = (files("tokenry.data") / "phrase_lists" / "en.txt").read_text(encoding="utf-8")
    assert head.startswith("# ") and "tokenry profile" in head and "limits" in head


def test_it_stands_by_its_name_in_every_form(tmp_path):
    listed = tuple(builtin_phrases("en"))
    (tmp_path / "slop.txt").write_text("a phrase of mine\nbuiltin:en\ntapestry\n")
    assert Antislop(phrases="builtin:en").phrases == Antislop.from_strings(["phrases=builtin:en"]).phrases == listed
    assert Antislop(phrases=tmp_path / "slop.txt").phrases == ("a phrase of mine", *listed)
    assert Antislop(phrases=["builtin:en", "more"]).phrases == (*listed, "more")
    assert Antislop(**Antislop(phrases="builtin:en").model_dump()).phrases == listed
    with pytest.raises(InputError, match="there is no list 'builtin:fr'; the lists are builtin:en"):
        Antislop(phrases="builtin:fr")


def test_banning_it_changes_no_text_without_its_phrases(make_model, tokenizer):
    model, ban = make_model("llama"), Antislop(phrases="builtin:en")
    options = {"max_new_tokens": 40, "do_sample": True, "seed": 3, "pad_token_id": 1}
    prompt = {"input_ids": torch.tensor([[20, 30, 40]])}
    banned = generate(model, tokenizer, prompt, methods=[ban], **options)
    assert banned.new_ids == generate(model, tokenizer, prompt, **options).new_ids and not banned.events
