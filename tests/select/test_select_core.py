"""The shared pieces of the select methods: choices and budgets as plain numbers, and the cutter on real models."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import own_hooks
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from tokenry import decode
from tokenry.core.errors import InputError
from tokenry.models.anatomy import full_attention_layers
from tokenry.models.kv_cache import cache_bytes, layer_lengths
from tokenry.select import CacheCutter, FirstLast, KeepMap, LowestScore, Random, UniformStride
from tokenry.select.keep.topk import allocate_proportional, keep_topk, stage_counts

UNEQUAL = {0: 10, 1: 25, 2: 16, 3: 60}  # the last one keeps the whole prompt


def ids(*shape, seed=1):
    return torch.randint(2, 320, shape, generator=torch.Generator().manual_seed(seed))


def padded(lengths, width, seed=1):
    """Left-padded ids and mask."""
    x, mask = ids(len(lengths), width, seed=seed), torch.ones(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
        x[row, : width - length] = 1
    return x, mask


@pytest.fixture(params=["sdpa", "eager"])
def implementation(request, llama):
    llama.set_attn_implementation(request.param)
    yield request.param
    llama.set_attn_implementation("sdpa")


# --- keep_topk -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(0, 35), st.data())
def test_keep_topk_is_stable_and_keeps_the_protected(values, n, data):
    scores = torch.tensor(values, dtype=torch.float32)
    protect = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    if n < int(protect.sum()):
        with pytest.raises(InputError, match="protected"):
            keep_topk(scores, n, protect)
        return
    got = keep_topk(scores, n, protect).tolist()
    ranked = sorted(range(len(values)), key=lambda i: (not protect[i], -values[i], i))
    assert got == sorted(ranked[:n])
    assert keep_topk(scores, n).tolist() == sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:n])


def test_keep_topk_unsorted_gives_the_best_first_for_each_row():
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 4.0, 6.0]])
    assert keep_topk(scores, 2, sort=False).tolist() == [[1, 2], [2, 0]]


def test_keep_topk_refuses_a_negative_count():
    with pytest.raises(InputError, match=">= 0"):
        keep_topk(torch.zeros(3), -1)


# --- allocators ------------------------------------------------------------------------------------------------

WEIGHTS = st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(lambda w: sum(w) > 0)


@settings(max_examples=200)
@given(WEIGHTS, st.integers(0, 500), st.integers(0, 40), st.integers(0, 80), st.booleans(), st.booleans())
def test_allocation_invariants(weights, total, floor, room, half_even, redistribute):
    cap, rounding = floor + room, "half_even" if half_even else "floor"
    if total < len(weights) * floor:
        with pytest.raises(InputError, match="raise the budget or lower the minimum"):
            allocate_proportional(weights, total, cap, floor, rounding, redistribute)
        return
    parts = allocate_proportional(weights, total, cap, floor, rounding, redistribute)
    assert sum(parts) <= total
    assert all(floor <= p <= cap for p in parts)
    assert all(a >= b for i, a in enumerate(parts) for j, b in enumerate(parts) if weights[i] > weights[j])
    if redistribute:
        assert sum(parts) == total or all(p == cap for p in parts)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0], [1.0, -0.1], [1.0, math.nan]])
def test_allocation_refuses_bad_weights(weights):
    with pytest.raises(InputError, match="weights must be"):
        allocate_proportional(weights, 10, 10)


def test_allocation_refuses_a_floor_above_the_cap():
    with pytest.raises(InputError, match="at least 5 and at most 4"):
        allocate_proportional([1.0], 10, 4, floor=5)


def test_stage_counts():
    assert stage_counts(100, [0.5, 0.257]) == [50, 25]
    assert stage_counts(100, [0.5, 0.5], of="current") == [50, 25]
    assert stage_counts(196, [0.5, 0.5], "current", "ceil_odd") == [99, 51]
    assert stage_counts(4, [1.0], "current", "ceil_odd") == [4]
    for ratios in ([1.5], [0.2, 0.5]):
        with pytest.raises(InputError):
            stage_counts(100, ratios)


# --- the cutter ------------------------------------------------------------------------------------------------


def test_keeping_everything_is_the_plain_model(llama, implementation):
    x, mask = padded([40, 33, 15], 40)
    plain = llama.generate(x, attention_mask=mask, max_new_tokens=12, do_sample=False)
    logits = llama(x, attention_mask=mask).logits
    with torch.no_grad(), CacheCutter(llama, Random(), dict.fromkeys(range(4), 40)) as run:
        same = llama.generate(x, attention_mask=mask, max_new_tokens=12, do_sample=False)
        torch.testing.assert_close(llama(x, attention_mask=mask).logits, logits, atol=1e-5, rtol=0)
    assert torch.equal(same, plain)
    assert not run.trace.cut and run.trace.kv_bytes() == sum(3 * 40 * size for size in run.trace.column_bytes.values())


def oracle(model, prompt, later, keep):
    """Logits of `later` after `prompt` when it may see only the kept columns of each layer: brute force.

    One forward over everything, in which each layer's eager attention is masked: rows of the prompt see all of it.
    """
    total, length = torch.cat([prompt, later], 1), prompt.shape[1]
    n = total.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool).tril()

    def hook(module, args, kwargs):
        allowed = causal.clone()
        dropped = ~keep.mask(module.layer_idx)[0]
        allowed[length:, :length] &= ~dropped
        mask = torch.zeros(1, 1, n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)
        return args, kwargs | {"attention_mask": mask}

    handles = [l.self_attn.register_forward_pre_hook(hook, with_kwargs=True) for l in model.model.layers]
    try:
        return model(total, use_cache=False).logits[:, length:]
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_unequal_layers_match_a_brute_force_softmax_over_what_was_kept(llama, implementation):
    prompt, later = ids(1, 60), ids(1, 7, seed=2)
    cache = DynamicCache(config=llama.config)
    with CacheCutter(llama, Random(), UNEQUAL) as run:
        llama(prompt, past_key_values=cache)
        assert layer_lengths(cache) == list(UNEQUAL.values())
        assert run.trace.kv_bytes() == cache_bytes(cache) and run.trace.counts() == UNEQUAL
        first = llama(later[:, :3], past_key_values=cache).logits  # several at once, then one by one
        rest = [llama(later[:, i : i + 1], past_key_values=cache).logits for i in range(3, 7)]
    expected = oracle(llama, prompt, later, run.trace)
    torch.testing.assert_close(torch.cat([first, *rest], 1), expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_unequal_layers_in_a_padded_batch_equal_single_prompts(llama, implementation):
    x, mask = padded([60, 41, 12, 30], 60)
    with CacheCutter(llama, FirstLast(), UNEQUAL) as run:
        batch = llama.generate(x, attention_mask=mask, max_new_tokens=10, do_sample=False)
        positions = run.trace.positions(0)
        for row, length in enumerate([60, 41, 12, 30]):
            single = llama.generate(x[row : row + 1, 60 - length :], max_new_tokens=10, do_sample=False)
            assert torch.equal(single[0, length:], batch[row, 60:])
            kept = positions[row][positions[row] >= 0]
            assert torch.equal(kept, run.trace.positions(0)[0][: len(kept)])


@torch.no_grad()
def test_generate_and_the_decode_loop_agree(llama):
    x, mask = padded([60, 33], 60)
    with CacheCutter(llama, UniformStride(), UNEQUAL):
        one = llama.generate(x, attention_mask=mask, max_new_tokens=12, do_sample=False)
        two = llama.generate(x, attention_mask=mask, max_new_tokens=12, do_sample=False, custom_generate=decode.loop)
        single = llama.generate(x[:1], max_new_tokens=12, do_sample=False, custom_generate=decode.loop)
    assert torch.equal(one, two) and torch.equal(single[0], one[0])


@torch.no_grad()
def test_rewinding_on_a_cut_cache_equals_a_cut_run_that_never_went_astray(llama, tokenizer):
    """A phrase ban crops generated tokens (one row) or hides them (a batch); the prompt's cut must survive both."""
    x, mask = padded([60, 44], 60, seed=24)
    options = {"max_new_tokens": 14, "do_sample": False, "custom_generate": decode.loop}
    with CacheCutter(llama, FirstLast(), UNEQUAL):
        plain = llama.generate(x, attention_mask=mask, **options)[:, 60:]
        assert ": and" in tokenizer.decode(plain[0])
        ban = {"monitors": [decode.PhraseBan([": and"])], "processing_class": tokenizer}
        single = llama.generate(x[:1], **options, **ban, return_dict_in_generate=True)
        assert single.events
        row = single.sequences[0, 60:]
        batch = llama.generate(x, attention_mask=mask, **options, **ban)
        assert torch.equal(batch[0, 60:], row)
        # without any rewind: feed what the row ended up with, token by token, into a new cut cache
        cache = DynamicCache(config=llama.config)
        logits = [llama(x[:1], past_key_values=cache).logits[0, -1]]
        logits += [llama(token.view(1, 1), past_key_values=cache).logits[0, -1] for token in row[:-1]]
    banned = {event.index for event in single.events}
    for i, (token, scores) in enumerate(zip(row, logits)):
        assert int(scores.argmax()) == int(token) or i in banned


@torch.no_grad()
def test_every_new_cache_is_compressed_and_older_ones_stay_usable(llama):
    a, b = ids(1, 60), ids(1, 50, seed=3)
    first, second = DynamicCache(config=llama.config), DynamicCache(config=llama.config)
    step = ids(1, 1, seed=4)
    with CacheCutter(llama, FirstLast(), dict.fromkeys(range(4), 12)) as run:
        llama(a, past_key_values=first)
        expected = llama(step, past_key_values=first).logits
        first.crop(-1)
        llama(b, past_key_values=second)
        assert run.trace.length == 50
        torch.testing.assert_close(llama(step, past_key_values=first).logits, expected)
    assert layer_lengths(first) == [13] * 4 and layer_lengths(second) == [12] * 4


@torch.no_grad()
def test_several_tokens_at_once_see_what_each_row_kept(llama, implementation):
    x, mask = padded([60, 44], 60, seed=7)
    more = ids(2, 5, seed=8)
    longer = torch.cat([mask, torch.ones_like(more)], 1)
    with CacheCutter(llama, FirstLast(), UNEQUAL):
        both, alone = DynamicCache(config=llama.config), DynamicCache(config=llama.config)
        llama(x, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=both)
        places = longer.cumsum(1)[:, 60:] - 1
        batch = llama(more, attention_mask=longer, position_ids=places, past_key_values=both).logits
        llama(x[1:, 16:], past_key_values=alone)
        single = llama(more[1:], past_key_values=alone).logits
    torch.testing.assert_close(batch[1:], single, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 4])
def test_padding_stays_hidden_whatever_a_later_mask_says(llama, count):
    x, mask = padded([60, 44], 60, seed=9)
    more = ids(2, count, seed=10)
    right = torch.cat([mask, torch.ones_like(more)], 1)
    found = []
    with CacheCutter(llama, FirstLast(), UNEQUAL):
        for later in (right, torch.ones_like(right)):
            cache = DynamicCache(config=llama.config)
            llama(x, attention_mask=mask, past_key_values=cache)
            places = torch.arange(60, 60 + count)[None]
            found.append(llama(more, attention_mask=later, position_ids=places, past_key_values=cache).logits)
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_a_prompt_as_long_as_the_budget_leaves_the_cache_as_it_was(llama):
    cache, budgets = DynamicCache(config=llama.config), dict.fromkeys(range(4), 40)
    with CacheCutter(llama, FirstLast(), budgets) as run:
        llama(ids(1, 40), past_key_values=cache)
    assert {type(layer) for layer in cache.layers} == {DynamicLayer} and run.trace.counts() == budgets
    llama(ids(1, 1), past_key_values=cache)  # outside too


@torch.no_grad()
def test_one_token_of_the_prompt_taken_back_is_refused(llama):
    cache = DynamicCache(config=llama.config)
    with CacheCutter(llama, FirstLast(), dict.fromkeys(range(4), 12)):
        llama(ids(1, 50), past_key_values=cache)
        cache.crop(-1)
        with pytest.raises(InputError, match="cropped into the compressed prompt"):
            llama(ids(1, 1), past_key_values=cache)


@torch.no_grad()
def test_positions_count_from_the_layer_that_has_seen_most(llama):
    """As after a step that a layer was skipped in."""
    found = []
    with CacheCutter(llama, FirstLast(), dict.fromkeys(range(4), 12)):
        for options in ({}, {"position_ids": torch.tensor([[51]])}):
            cache = DynamicCache(config=llama.config)
            llama(ids(1, 50), past_key_values=cache)
            llama(ids(1, 1, seed=2), past_key_values=cache)
            cache.layers[0].crop(-1)
            found.append(llama(ids(1, 1, seed=3), past_key_values=cache, **options).logits)
        mask = torch.ones(1, 53, 53)
        with pytest.raises(InputError, match="give a 2-D mask"):
            llama(ids(1, 1), attention_mask=mask, past_key_values=cache)
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_sliding_layers_are_left_alone(make_model):
    gemma = make_model("gemma3")
    assert full_attention_layers(gemma) == [1, 3]
    x, mask = padded([60, 35], 60)
    with CacheCutter(gemma, FirstLast(), {1: 10, 3: 20}) as run:
        batch = gemma.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False)
        single = gemma.generate(x[1:, 25:], max_new_tokens=8, do_sample=False)
    assert torch.equal(single[0, 35:], batch[1, 60:]) and run.trace.counts() == {1: 10, 3: 20}


def test_controls_keep_what_they_say(llama):
    x, mask = padded([64, 32], 64)
    kept = {}
    for name, scorer in {
        "first+last": FirstLast(sinks=2),
        "stride": UniformStride(),
        "random": Random(3),
        "again": Random(3),
        "lowest": LowestScore(FirstLast(sinks=2)),
    }.items():
        with torch.no_grad(), CacheCutter(llama, scorer, dict.fromkeys(range(4), 8)) as run:
            llama(x, attention_mask=mask)
        kept[name] = run.trace.positions(1).tolist()
    assert kept["first+last"] == [[0, 1, 58, 59, 60, 61, 62, 63], [0, 1, 26, 27, 28, 29, 30, 31]]
    assert kept["stride"] == [list(range(0, 64, 8)), list(range(0, 32, 4))]
    assert kept["lowest"] == [list(range(2, 10)), list(range(2, 10))]
    assert kept["random"] == kept["again"] and len(set(kept["random"][0])) == 8


def test_hooks_are_gone_after_an_exception(llama):
    cutter = CacheCutter(llama, Random(), UNEQUAL)
    with pytest.raises(RuntimeError, match="stop"), cutter:
        assert own_hooks(llama)
        raise RuntimeError("stop")
    assert not own_hooks(llama)


def test_keep_map_counts_padding_out():
    valid = torch.tensor([[False, True, True, True]])
    keep = KeepMap(4, valid, columns={0: torch.tensor([[0, 1, 3]])}, column_bytes={0: 8})
    assert keep.mask(0).tolist() == [[False, True, False, True]]
    assert keep.positions(0).tolist() == [[-1, 0, 2]]
    assert keep.kv_bytes() == 24


# --- refusals --------------------------------------------------------------------------------------------------


def test_refuses_what_it_cannot_cut(llama):
    x = ids(2, 40)
    right = torch.ones_like(x)
    right[0, 30:] = 0
    with CacheCutter(llama, Random(), UNEQUAL), torch.no_grad():
        with pytest.raises(InputError, match="padding_side = 'left'"):
            llama(x, attention_mask=right)
        with pytest.raises(InputError, match="4-D"):
            llama(x, attention_mask=torch.ones(2, 1, 40, 40, dtype=torch.bool))
        with pytest.raises(InputError, match="StaticCache cannot be cut"):
            llama(x, past_key_values=StaticCache(config=llama.config, max_cache_len=64))
        with pytest.raises(InputError, match="already being compressed"), CacheCutter(llama, Random(), UNEQUAL):
            pass
        cache = DynamicCache(config=llama.config)
        llama(x, past_key_values=cache)
        with pytest.raises(InputError, match="evicted ones included"):
            llama(x[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 11))
    assert not own_hooks(llama)


def test_refuses_drafts_that_were_compressed_with_the_prompt(llama):
    x = ids(1, 60)
    x[0, 40:] = x[0, 20:40]  # prompt lookup finds a draft at once
    with CacheCutter(llama, FirstLast(), UNEQUAL), pytest.raises(InputError, match="without an assistant"):
        llama.generate(x, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)


@torch.no_grad()
def test_beams_share_the_cut_of_their_prompt(llama):
    x, mask = padded([60, 44], 60)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    with CacheCutter(llama, FirstLast(), UNEQUAL):
        batch = llama.generate(x, attention_mask=mask, **options)
        assert torch.equal(llama.generate(x[:1], **options)[0], batch[0])
        assert torch.equal(llama.generate(x[1:, 16:], **options)[0, 44:], batch[1, 60:])


def test_refuses_attention_without_a_mask_per_layer(llama):
    llama.config._attn_implementation = "flex_attention"
    try:
        with pytest.raises(InputError, match="attn_implementation='sdpa'"), CacheCutter(llama, Random(), UNEQUAL):
            pass
    finally:
        llama.config._attn_implementation = "sdpa"
