"""The engine contract, on transformers and on llama.cpp with the same F32 weights, and what both write."""

from functools import partial

import numpy as np
import pytest
import torch
from support.families import SIZES, TEXT, build
from support.gguf_files import dropping, logits_of, save_gguf
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import tokenry
from tokenry import InputError
from tokenry.decode import (
    VERIFIERS,
    Antislop,
    EarlyExitDrafter,
    ModelDrafter,
    NGramDrafter,
    SkipDecode,
    Speculation,
)
from tokenry.decode.engines.choice import open_engine
from tokenry.decode.engines.llamacpp import BLOCK, Sequences
from tokenry.models.llamacpp.model import LlamaCppModel, Weights

PROMPTS = ["the the the the old light old the", "a keeper"]


@pytest.fixture(scope="module")
def torch_model():
    return build("llama")


@pytest.fixture(scope="module")
def loaded(torch_model, tokenizer, tmp_path_factory):
    """The same model as a GGUF file, run by llama.cpp."""
    folder = tmp_path_factory.mktemp("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENRY_CACHE", str(folder / "cache"))
        yield tokenry.load(save_gguf(torch_model, tokenizer, folder / "tiny.gguf"), threads=1)


@pytest.fixture(params=["transformers", "llamacpp"])
def model(request, torch_model, loaded):
    return torch_model if request.param == "transformers" else loaded.model


def padded(*rows):
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return tokens, torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])


# --- the contract --------------------------------------------------------------------------------------------------


def test_what_is_taken_back_and_fed_again_is_bitwise_the_same(model):
    engine = open_engine(model)
    engine.forward(torch.tensor([[5, 6, 7, 8]]))
    before = engine.forward(torch.tensor([[9, 10]]))
    engine.forward(torch.tensor([[11]]))
    engine.rollback(0, 3)
    assert torch.equal(engine.forward(torch.tensor([[9, 10]])), before)
    assert engine.calls == 4 and engine.tokens_processed == 9


def test_rows_of_a_batch_are_as_alone(model, torch_model):
    rows = [5, 6, 7, 8], [50, 60]
    engine = open_engine(model)
    found = engine.forward(*padded(*rows))
    torch.testing.assert_close(found, torch.stack([logits_of(torch_model, row)[-1] for row in rows]))
    engine.rollback(0, 1)
    found = engine.forward(*padded([70, 71, 72], [80]))
    torch.testing.assert_close(found[0], logits_of(torch_model, [5, 6, 7, 70, 71, 72])[-1])
    torch.testing.assert_close(found[1], logits_of(torch_model, [50, 60, 80])[-1])


def test_a_freed_row_leaves_the_others(model, torch_model):
    engine = open_engine(model)
    engine.forward(*padded([5, 6, 7], [50, 60]))
    engine.free(0)
    found = engine.forward(*padded([], [61]))
    torch.testing.assert_close(found[1], logits_of(torch_model, [50, 60, 61])[-1])


def test_trees_are_single_paths(model, torch_model):
    engine, prompt = open_engine(model), [5, 6, 7]
    engine.forward(torch.tensor([prompt, prompt]))
    parents = np.array([[-1, -1, 0, 0], [-1, 0, 1, -1]])
    tokens = torch.tensor([[20, 21, 22, 23], [30, 31, 32, 33]])
    found = engine.forward_tree(tokens, torch.ones_like(tokens).bool(), parents)
    more = engine.forward_tree(torch.tensor([[24, 25], [34, 35]]), torch.ones(2, 2).bool(), np.array([[1, 2], [1, 3]]))
    paths = {(0, 3): [20, 23], (0, 1): [21], (1, 2): [30, 31, 32], (1, 3): [33]}
    for (row, column), path in paths.items():
        torch.testing.assert_close(found[row, column], logits_of(torch_model, prompt + path)[-1])
    for (row, column), path in {(0, 0): [21, 24], (0, 1): [20, 22, 25], (1, 0): [30, 31, 34], (1, 1): [33, 35]}.items():
        torch.testing.assert_close(more[row, column], logits_of(torch_model, prompt + path)[-1])
    engine.commit([[0, 2, 5], []])
    found = engine.forward(torch.tensor([[40], [41]]))
    torch.testing.assert_close(found[0], logits_of(torch_model, [*prompt, 20, 22, 25, 40])[-1])
    torch.testing.assert_close(found[1], logits_of(torch_model, [*prompt, 41])[-1])


# --- what is written -----------------------------------------------------------------------------------------------

SAMPLED = {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9}


def both(torch_model, loaded, **options):
    one, two = (
        tokenry.generate(model, loaded.tokenizer, PROMPTS, max_new_tokens=40, seed=3, **options)
        for model in (torch_model, loaded.model)
    )
    assert one.new_ids == two.new_ids and one.stop_reasons == two.stop_reasons
    assert [(e.row, e.index, e.kind, e.rejected) for e in one.events] == [
        (e.row, e.index, e.kind, e.rejected) for e in two.events
    ]
    assert (one.forward_calls, one.tokens_processed) == (two.forward_calls, two.tokens_processed)
    return two


@pytest.mark.parametrize("draw", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampled"])
def test_texts_and_repairs_are_those_of_transformers(torch_model, loaded, draw):
    both(torch_model, loaded, **draw)
    banned = list(filter(str.isalpha, map(chr, range(33, 0x800))))  # many, as a random model writes noise
    repaired = both(torch_model, loaded, methods=[Antislop(phrases=banned)], **draw)
    assert repaired.events


@pytest.mark.parametrize("draw", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("verifier", "drafts"), [("single", 1), ("kseq", 4), ("rrs-without", 8)])
def test_drafts_are_those_of_transformers(torch_model, loaded, draw, verifier, drafts):
    found = both(torch_model, loaded, speculation=Speculation(NGramDrafter(), VERIFIERS[verifier], drafts, 4), **draw)
    assert found.stats.drafted


@pytest.mark.parametrize("draw", [{"do_sample": False}, SAMPLED], ids=["greedy", "sampled"])
def test_a_second_file_drafts(torch_model, loaded, tokenizer, tmp_path, monkeypatch, draw):
    monkeypatch.setenv("TOKENRY_CACHE", str(tmp_path))
    small = dropping(torch_model, 3)
    file = save_gguf(small, tokenizer, tmp_path / "small.gguf")
    found = [
        tokenry.generate(
            target,
            loaded.tokenizer,
            PROMPTS,
            max_new_tokens=40,
            seed=3,
            speculation=Speculation(ModelDrafter(drafter), VERIFIERS["kseq"], 4, 3),
            **draw,
        )
        for target, drafter in ((torch_model, small), (loaded.model, tokenry.load(file, threads=1).model))
    ]
    assert found[0].new_ids == found[1].new_ids and vars(found[0].stats) == vars(found[1].stats)
    assert found[1].stats.accepted > 0


def test_what_needs_the_inside_is_refused(loaded):
    for options in (
        {"methods": [SkipDecode()]},
        {"interventions": [torch.no_grad()]},
        {"speculation": Speculation(EarlyExitDrafter(), VERIFIERS["kseq"])},
        {"rewind": "reprefill"},
    ):
        with pytest.raises(InputError, match=r"gives logits alone, so .* cannot be used; load the model with transf"):
            tokenry.generate(*loaded, "the old light", max_new_tokens=5, **options)
    with pytest.raises(InputError, match="gives logits alone"):
        loaded.model(torch.tensor([[1, 2]]))


# --- sequences -----------------------------------------------------------------------------------------------------


def test_sequences_come_and_go(loaded, torch_model):
    pool = Sequences(loaded.model, 2, 256)
    one, two = pool.join(), pool.join()
    with pytest.raises(InputError, match="all 2 sequences are taken"):
        pool.join()
    found = pool.forward({one: [5, 6, 7], two: [8]})
    torch.testing.assert_close(found[two], logits_of(torch_model, [8])[-1])
    pool.free(one)
    assert pool.join() == one and pool.room == pool.cells - 1 and pool.free_slots == 0
    torch.testing.assert_close(pool.forward({one: [9, 10]})[one], logits_of(torch_model, [9, 10])[-1])
    torch.testing.assert_close(pool.forward({two: [11]})[two], logits_of(torch_model, [8, 11])[-1])


def test_a_full_cache_loses_nothing(loaded, torch_model):
    pool = Sequences(loaded.model, 2, 256)
    one, two = pool.join(), pool.join()
    pool.forward({one: [5] * 200, two: [6, 7]})
    for blocks, why in (
        ({one: [1], two: [2] * 60}, "61 tokens do not fit into the cache, which has room for 54 of 256"),
        ({one: [320]}, "tokens run from 320 to 320"),
        ({one: []}, "no new tokens"),
        ({7: [1]}, "there is no sequence 7"),
        ({one: [1] * 313}, "the context has 512"),
    ):
        with pytest.raises(InputError, match=why):
            pool.forward(blocks)
    with pytest.raises(InputError, match="3 tokens cannot be taken back"):
        pool.rollback(two, 3)
    torch.testing.assert_close(pool.forward({two: [8]})[two], logits_of(torch_model, [6, 7, 8])[-1])


def test_prompts_longer_than_a_block(loaded, torch_model, tokenizer):
    ids = (tokenizer.encode(TEXT) * 9)[: BLOCK - 100]
    pool = Sequences(loaded.model, 2)
    found = pool.forward({pool.join(): ids, pool.join(): ids[1:]})
    torch.testing.assert_close(found[0], logits_of(torch_model, ids)[-1])
    torch.testing.assert_close(found[1], logits_of(torch_model, ids[1:])[-1])


def test_positions_beyond_a_sliding_window(tokenizer, tmp_path):
    """Five layers of six see the last 16 tokens: fed at once, one by one, and again after some were taken back."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    layers = ["sliding_attention"] * 5 + ["full_attention"]
    gemma = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, num_hidden_layers=6, layer_types=layers, sliding_window=16))
    with torch.no_grad():
        for parameter in gemma.eval().parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else parameter.normal_(std=0.3)
    weights = Weights(save_gguf(gemma, tokenizer, tmp_path / "gemma.gguf", "gemma3"), threads=1)
    pool, ids = Sequences(LlamaCppModel(gemma.config, weights)), (tokenizer.encode(TEXT) * 2)[:120]
    wanted, slot = logits_of(gemma, ids), pool.join()
    same = partial(torch.testing.assert_close, atol=5e-3, rtol=0)  # llama.cpp has a table of halves for GELU
    same(pool.forward({slot: ids[:90]})[slot], wanted[89])
    for place in range(90, 120):
        same(pool.forward({slot: ids[place : place + 1]})[slot], wanted[place])
    pool.rollback(slot, 40)
    same(pool.forward({slot: ids[80:100]})[slot], wanted[99])
    seen = Gemma3ForCausalLM(Gemma3TextConfig(**{**gemma.config.to_dict(), "sliding_window": 512})).eval()
    seen.load_state_dict(gemma.state_dict())
    difference = (logits_of(seen, ids) - wanted).abs().amax(-1)
    assert difference[:16].max() < 1e-3 and difference[20:].min() > 0.05  # the window is felt


def test_a_text_ends_with_the_context(loaded):
    with pytest.warns(UserWarning, match="it ends there"):
        found = tokenry.generate(*loaded, "a" * 300, max_new_tokens=400)
    assert found.stop_reasons == ["context"] and len(found.prompt_ids[0]) + len(found.new_ids[0]) == 512
    with pytest.raises(InputError, match="context window 512; shorten the prompt"):
        tokenry.generate(*loaded, "a" * 600)
