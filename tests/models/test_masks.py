"""Structured masks pair by pair, and the test that a model obeys them."""

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from tokenry.core.errors import InputError
from tokenry.models.masks import (
    as_attention_mask,
    block_diffusion_mask,
    check_bidirectional,
    check_full_attention,
    check_mask,
    check_mask_token,
    draft_mask,
    make_bidirectional,
    own_position,
    sees_both_sides,
)

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(impl="sdpa", dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(LlamaConfig(**SIZES), attn_implementation=impl).to(dtype).eval()


@pytest.mark.parametrize("length", [1, 4, 7, 16])
@pytest.mark.parametrize("size", [2, 4])
def test_block_diffusion_pair_by_pair(length, size):
    mask = block_diffusion_mask(length, size)
    assert mask.shape == (1, 1, 2 * length, 2 * length) and mask.dtype == torch.bool
    for row in range(2 * length):
        for column in range(2 * length):
            i, j = row % length, column % length
            if row < length:
                expected = column < length and j <= i
            elif column < length:
                expected = j // size < i // size
            else:
                expected = j // size == i // size
            assert mask[0, 0, row, column] == expected


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_draft_pair_by_pair(past, size):
    mask = draft_mask(past, size)
    rows = size + size * size
    assert mask.shape == (1, 1, rows, past + rows)
    for row in range(rows):
        for column in range(rows):
            replica, other = (row - size) // size, (column - size) // size  # 0-based: replica r saw r + 1 tokens
            if row < size:
                expected = column <= row
            elif column < size:
                expected = column <= replica
            else:
                expected = replica == other
            assert mask[0, 0, row, past + column] == expected
        assert mask[0, 0, row, :past].all()


@pytest.mark.parametrize("impl", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_obeyed(impl, dtype):
    model = llama(impl, dtype)
    for mask in (block_diffusion_mask(8, 4), draft_mask(0, 3), torch.ones(1, 1, 5, 5, dtype=torch.bool)):
        check_mask(model, mask)


def test_both_kernels_give_the_same_logits():
    ids, mask = torch.arange(12)[None], block_diffusion_mask(6, 2)
    first, second = (
        m(input_ids=ids, attention_mask=as_attention_mask(m, mask)).logits for m in map(llama, ("sdpa", "eager"))
    )
    assert torch.allclose(first, second, atol=1e-5)


def test_a_model_that_drops_the_mask_is_refused():
    model = llama()
    plain = model.forward
    model.forward = lambda attention_mask=None, **kw: plain(**kw)
    with pytest.raises(InputError, match=r"sees token|hides token"):
        check_mask(model, block_diffusion_mask(8, 4))


def test_a_leak_is_named():
    model = llama()
    plain = model.forward
    model.forward = lambda attention_mask=None, **kw: plain(attention_mask=torch.ones_like(attention_mask), **kw)
    with pytest.raises(InputError, match="ignores the attention mask: row 0 sees token 1"):
        check_mask(model, block_diffusion_mask(8, 4))


def test_what_is_hidden_is_named():
    model = llama()
    plain = model.forward
    model.forward = lambda attention_mask=None, **kw: plain(attention_mask=attention_mask.tril(), **kw)
    with pytest.raises(InputError, match="hides token 1 from row 0"):
        check_mask(model, torch.ones(1, 1, 4, 4, dtype=torch.bool))


def test_kernels_without_masks_are_refused():
    model = llama()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(InputError, match="flash_attention_2 does not take a structured mask"):
        check_mask(model, draft_mask(0, 2))


@pytest.mark.parametrize("make", [lambda: block_diffusion_mask(8, 1), lambda: draft_mask(0, 0)])
def test_blocks_of_one_are_refused(make):
    with pytest.raises(InputError, match="block_size"):
        make()


def test_a_model_becomes_bidirectional():
    model = llama()
    with pytest.raises(InputError, match="the model is causal"):
        check_bidirectional(model)
    check_bidirectional(make_bidirectional(model))
    ids = torch.arange(7)[None]
    everything = torch.ones(1, 1, 7, 7, dtype=torch.bool)
    assert torch.equal(model(input_ids=ids).logits, llama()(input_ids=ids, attention_mask=everything).logits)


def test_a_saved_model_stays_bidirectional(tmp_path):
    make_bidirectional(llama()).save_pretrained(tmp_path)
    check_bidirectional(LlamaForCausalLM.from_pretrained(tmp_path))


def test_a_sliding_window_is_found():
    """A mask of four dimensions takes the window's place, so that only the configuration tells of it."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, sliding_window=4, layer_types=["sliding_attention"] * 2
    )
    model = Gemma3ForCausalLM(config).eval()
    check_mask(model, torch.ones(1, 1, 12, 12, dtype=torch.bool))
    with pytest.raises(InputError, match="has layers with a sliding window"):
        check_full_attention(model)
    check_full_attention(llama())


def test_what_two_layers_pass_on_is_no_leak():
    """Row 3 sees token 2, which sees token 1, which sees token 0: two layers reach token 1, and token 0 is too far."""
    chain = torch.eye(4, dtype=torch.bool) | torch.diag(torch.ones(3, dtype=torch.bool), -1)
    check_mask(llama(), chain[None, None])
    model = llama()
    plain = model.forward
    model.forward = lambda attention_mask=None, **kw: plain(attention_mask=torch.ones(1, 1, 4, 4).bool().tril(), **kw)
    with pytest.raises(InputError, match="row 3 sees token 0"):
        check_mask(model, chain[None, None])


@pytest.mark.parametrize("token", [-1, 40, 41])
def test_a_mask_token_outside_is_refused(token):
    with pytest.raises(InputError, match=f"mask_token_id={token} is outside the vocabulary of 40"):
        check_mask_token(llama(), token)


@pytest.mark.parametrize("token", [0, 39])
def test_the_first_and_the_last_token_may_be_the_mask(token):
    check_mask_token(llama(), token)


@pytest.mark.parametrize("name", ["is_causal", "causal"])
def test_a_configuration_says_that_both_sides_are_seen(name):
    model = llama()
    assert not sees_both_sides(model)
    setattr(model.config, name, False)
    assert sees_both_sides(model)


def test_one_causal_part_suffices():
    model = llama()
    parts = [layer.self_attn for layer in model.model.layers]
    parts[0].is_causal = False
    assert not sees_both_sides(model)
    parts[1].is_causal = False
    assert sees_both_sides(model)


def test_logits_of_the_own_position():
    logits = torch.arange(24.0).reshape(1, 4, 6)
    assert own_position(logits, False) is logits
    assert own_position(logits, True)[0].tolist() == logits[0, [0, 0, 1, 2]].tolist()
