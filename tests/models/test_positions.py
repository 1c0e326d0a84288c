"""At the end of a model's positions: the text ends with a reason, or a warning says that it goes beyond."""

import warnings

import pytest
import torch
from support.families import build
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import tokenry
from tokenry import InputError, decode
from tokenry.learned.difficulty_probe import read_questions
from tokenry.models.positions import context_window, fixed_positions

WINDOW = 24
TABLES = ["gpt2", "opt", "gptj"]


def small(kind, window=WINDOW):
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 1, "vocab_size": 320}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(n_positions=window, n_embd=32, n_layer=2, n_head=2, **ids)).eval()
    if kind == "gptj":
        return GPTJForCausalLM(
            GPTJConfig(n_positions=window, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, **ids)
        ).eval()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": window}
    if kind == "opt":
        return OPTForCausalLM(OPTConfig(ffn_dim=32, word_embed_proj_dim=32, **sizes, **ids)).eval()
    return LlamaForCausalLM(LlamaConfig(intermediate_size=32, **sizes, **ids)).eval()


def methods(name, model):
    return {
        "plain": [],
        "prompt lookup": [decode.Spectr(draft_length=8)],
        "early exit": [decode.Spectr(drafter="early-exit", draft_length=8, num_drafts=2)],
        "ban": [decode.Antislop(phrases=("sea",))],
    }[name]


def test_tables_are_told_from_what_goes_on():
    assert [fixed_positions(small(kind)) for kind in (*TABLES, "llama")] == [WINDOW] * 3 + [None]
    assert context_window(small("llama")) == WINDOW
    assert fixed_positions(build("llama")) is None and fixed_positions(build("opt")) == 512


@pytest.mark.parametrize("way", ["plain", "prompt lookup", "early exit", "ban"])
@pytest.mark.parametrize("kind", TABLES)
def test_a_table_ends_the_text_with_a_reason(tokenizer, kind, way):
    """A batch of unequal prompts, each up to its own last position; what it writes is what is written before."""
    model = small(kind)
    prompts = [[5, 6, 7, 8, 5, 6, 7, 8, 5, 6], [9, 10]]
    with pytest.warns(UserWarning, match=f"context window is {WINDOW}: it ends there"):
        out = tokenry.generate(model, tokenizer, prompts, methods=methods(way, model), max_new_tokens=20)
    assert [len(row) for row in out.new_ids] == [14, 20] and out.stop_reasons == ["context", "budget"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = tokenry.generate(model, tokenizer, prompts[:1], methods=methods(way, model), max_new_tokens=14)
    assert short.new_ids[0] == out.new_ids[0] and short.stop_reasons == ["budget"]


@pytest.mark.parametrize("way", ["plain", "prompt lookup", "early exit", "ban"])
def test_rotary_positions_go_on_with_a_warning(tokenizer, way):
    model = small("llama")
    with pytest.warns(UserWarning, match="beyond it the model writes what it was not made for"):
        out = tokenry.generate(model, tokenizer, [5, 6, 7, 8], methods=methods(way, model), max_new_tokens=30)
    assert len(out.new_ids[0]) == 30 and out.stop_reasons == ["budget"]


@pytest.mark.parametrize("kind", TABLES)
def test_a_drafter_with_fewer_positions_stops_drafting(tokenizer, kind):
    target, drafter = small("llama", 64), small(kind)
    inputs = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 40, "pad_token_id": 1}
    plain = target.generate(inputs, **options)
    drafted = target.generate(
        inputs, custom_generate=decode.speculative, drafter=drafter, num_drafts=2, draft_length=6, **options
    )
    assert torch.equal(drafted, plain)


@pytest.mark.parametrize("kind", [*TABLES, "llama"])
def test_what_is_longer_is_refused_before_the_work(tokenizer, kind):
    model, text = small(kind), "a whisper in the night " * 9
    with pytest.raises(InputError, match=f"context window {WINDOW}"):
        tokenry.generate(model, tokenizer, text)
    with pytest.raises(InputError, match=f"context window {WINDOW}"):
        read_questions(model, tokenizer, [text])


def test_embeddings_and_judges_of_longer_texts_are_refused(tokenizer):
    from tokenry.judge import CRewScorer
    from tokenry.represent import PromptEmbedder

    for kind in ("llama", "gpt2"):
        with pytest.raises(InputError, match=str(WINDOW)):
            PromptEmbedder(small(kind), tokenizer).encode(["a whisper in the night " * 9])
        with pytest.raises(InputError, match=f"context window {WINDOW}"):
            CRewScorer(small(kind), tokenizer).score_batch(["a"], ["a whisper in the night " * 9])
