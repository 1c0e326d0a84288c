"""Methods, the catalogue, loading models, and slop profiles."""

import json
import os
import subprocess
import sys
from multiprocessing import get_context
from typing import ClassVar, Literal

import pytest
import torch
from pydantic import Field
from transformers import BertConfig, BertModel

from tokenry import InputError, catalog, load
from tokenry.core.method import Lines, Method
from tokenry.judge import Reference, SlopProfile, human_reference
from tokenry.judge.text.slop import Pattern
from tokenry.models.folders import cache_folder
from tokenry.text.words import FoldedText, content_words, fold


class Example(Method):
    slug: ClassVar[str] = "example"
    budget: int = Field(256, ge=1, le=4096, description="tokens kept")
    share: float = Field(0.5, gt=0, lt=1, description="share kept")
    rule: Literal["first", "last"] = Field("last", description="which end")
    words: Lines = Field((), description="words")
    limit: int | None = Field(None, ge=1, description="limit")


def test_parameters_are_declared_once():
    method = Example.from_strings(["budget=128", "share=0.25", 'words=["a","b"]', "limit=3"])
    assert (method.budget, method.share, method.words, method.limit) == (128, 0.25, ("a", "b"), 3)
    with pytest.raises(Exception, match="frozen"):
        method.budget = 5
    by_name = {o.name: o for o in Example.options()}
    assert by_name["budget"].range == "a number in [1, 4096]" and by_name["share"].range == "a number in (0, 1)"
    assert by_name["rule"].range == "one of first, last" and by_name["limit"].default == "none"


@pytest.mark.parametrize(
    "pairs, message",
    [
        (["budget=0"], r"example: budget='0' is not allowed .* give a number in \[1, 4096\]"),
        (["budget=many"], "budget='many' is not allowed"),
        (["rule=middle"], "give one of first, last"),
        (["bugdet=3"], r"no option 'bugdet'; its options are: budget \(a number in \[1, 4096\]\), share"),
        (["budget"], "write -o budget=VALUE"),
        (["words=/nowhere"], "'/nowhere' cannot be read"),
        (["words=[1"], "not a JSON list"),
    ],
)
def test_bad_parameters_are_refused_in_one_sentence(pairs, message):
    with pytest.raises(InputError, match=message) as caught:
        Example.from_strings(pairs)
    assert "\n" not in str(caught.value)


def test_a_phrase_file_must_be_text(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8 text"):
        Example(words=str(tmp_path / "binary"))


def test_every_entry_of_the_catalogue_is_complete():
    for entry in catalog.METHODS:
        method = entry.load()
        assert (method.slug, method.stage) == (entry.slug, entry.stage)
        assert method.claim and "arXiv" in method.paper and method.title
        assert all(option.description for option in method.options())


def test_unknown_methods_are_refused_with_the_nearest():
    with pytest.raises(InputError, match="did you mean 'antislop'"):
        catalog.get("antislopp")
    with pytest.raises(InputError, match="tokenry list"):
        catalog.get("zzzzzz")
    with pytest.raises(InputError, match="the stages are tokenize, select"):
        catalog.by_stage("decoding")


def test_find_by_meaning():
    assert catalog.find("ban cliche phrases")[0].slug == "antislop"
    assert catalog.find("compressing the kv cache")[0].slug == "compresskv"
    with pytest.raises(InputError, match="few words"):
        catalog.find("??")


def test_the_catalogue_does_not_import_torch():
    code = "import sys, tokenry.cli, tokenry.catalog; sys.exit(any(m in sys.modules for m in ('torch', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- models --------------------------------------------------------------------------------------------------------


def test_the_embedded_model_talks(smollm2):
    model, tokenizer = smollm2
    assert tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert model.generation_config.eos_token_id == 2 and tokenizer.padding_side == "left"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**chat, do_sample=False, max_new_tokens=12)
    assert "Paris" in tokenizer.decode(answer[0])


def test_a_damaged_cache_is_rebuilt(smollm2, tmp_path, monkeypatch):
    """A truncated copy of the real cache is not complete, and loading builds it again."""
    import shutil

    real = cache_folder() / "smollm2-135m-instruct"
    copy = tmp_path / "smollm2-135m-instruct"
    shutil.copytree(real, copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    monkeypatch.setenv("TOKENRY_CACHE", str(tmp_path))
    model, _ = load("smollm2")
    assert torch.equal(model.lm_head.weight[:5], smollm2.model.lm_head.weight[:5])
    assert (copy / "model.safetensors").stat().st_size == (real / "model.safetensors").stat().st_size
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [copy.name]  # no half-built folder is left


def _load_in(folder):
    os.environ["TOKENRY_CACHE"] = str(folder)
    torch.set_num_threads(1)
    load("smollm2")


@pytest.mark.slow
def test_two_processes_may_start_at_once(tmp_path):
    context = get_context("spawn")
    workers = [context.Process(target=_load_in, args=(tmp_path,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["smollm2-135m-instruct"]


def test_a_folder_saved_by_transformers_loads(llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load(tmp_path, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and loaded.padding_side == "left"
    assert loaded.encode("the sea") == tokenizer.encode("the sea")


def test_unusable_models_are_refused(tmp_path, llama):
    with pytest.raises(InputError, match="no model 'smollm3'"):
        load("smollm3")
    with pytest.raises(InputError, match="no hub gave it"):
        load("nobody/nothing")
    with pytest.raises(InputError, match=r"no config\.json"):
        load(tmp_path)
    llama.config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no weights"):
        load(tmp_path)
    with pytest.raises(InputError, match="dtype 'int7' is unknown"):
        load("smollm2", dtype="int7")
    bert = tmp_path / "bert"
    BertModel(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(bert)
    (bert / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(InputError, match="not a causal language model"):
        load(bert)


# --- words and slop profiles ---------------------------------------------------------------------------------------


def test_folding_keeps_offsets():
    text = "İSTANBUL Straße ǅ"
    assert fold(text) == "istanbul strasse ǆ"
    assert FoldedText(text).starts == [*range(13), 13, 13, 14, 15, 16]  # both s of ß come from it
    assert [w for w, _, _ in content_words("The sun's 3 ships, and don't sail")] == ["ships", "sail"]


def test_a_profile_ranks_what_is_overused():
    texts = ["Elara saw the silver moon dipped over water. It was a testament of time and water."] * 3 + [
        "The silver moon dipped over water once more, and Elara was silent about the water."
    ]
    human = Reference("test", 1000, {"silver moon": 1}, {})
    profile = SlopProfile.fit(texts, human)
    assert profile.words[0].text == "elara"
    assert profile.bigrams[0].text == "silver moon" and profile.bigrams[0].count == 4
    rate = 4 / sum(map(len, texts)) / (1 / 1000)
    assert profile.bigrams[0].ratio == pytest.approx(rate)
    assert "moon dipped" in [p.text for p in profile.new_bigrams]
    assert "silver moon dipped" in [p.text for p in profile.new_trigrams]
    assert "silver moon dipped" in [p.text for p in profile.phrases]
    bans = profile.ban_list({"words": 1, "phrases": 5, "new_bigrams": 2}, whitelist=["Elara"])
    assert "elara" not in bans["phrases"] and "silver moon dipped" in bans["phrases"] and len(bans["ngrams"]) == 2
    assert profile.score(texts[0]) > profile.score("An ordinary sentence about nothing.") == 0
    assert SlopProfile(bigrams=[Pattern("could feel", 3, 9.0)]).score("She could feel it") == 1000 * 2 / 4
    assert SlopProfile(bigrams=[Pattern("sun dipped", 3, 9.0)]).score("The sun had dipped") == 0
    assert profile.repetition(texts[0]) > 0


def test_ordinary_words_are_not_slop():
    """The baseline matters: a frequent word of English ranks below a rare one used as often."""
    profile = SlopProfile.fit(["people testament people testament people testament"], Reference("x", 1, {}, {}))
    assert [p.text for p in profile.words] == ["testament", "people"]


def test_profiles_are_kept(tmp_path):
    profile = SlopProfile.fit(["the crumbling tower " * 5], Reference("x", 10, {}, {}))
    profile.save(tmp_path / "p.json")
    assert SlopProfile.load(tmp_path / "p.json") == profile
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(InputError, match="not a slop profile"):
        SlopProfile.load(tmp_path / "bad.json")
    with pytest.raises(InputError, match="no text"):
        SlopProfile.fit([" "])
    with pytest.raises(InputError, match="unknown quota 'verbs'"):
        profile.ban_list({"verbs": 3})


def test_the_shipped_reference_is_human():
    reference = human_reference()
    assert reference.characters > 4_000_000 and reference.bigrams["young man"] > 50
    assert "testament resilience" not in reference.bigrams
