"""A conversation that goes on with its cache, inside and outside cache compression: the one text, or a refusal."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from tokenry.core.errors import InputError
from tokenry.decode import loop
from tokenry.hooks.attention import suppress
from tokenry.hooks.residual import on_feed
from tokenry.models.anatomy import full_attention_layers
from tokenry.models.kv_cache import layer_lengths
from tokenry.select import CacheCutter, FirstLast

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}


def ids(rows, columns, seed=0):
    return torch.randint(2, 320, (rows, columns), generator=torch.Generator().manual_seed(seed))


def padded(lengths, seed=0):
    """(ids, mask) of left-padded prompts."""
    width = max(lengths)
    mask = torch.stack([torch.tensor([0] * (width - n) + [1] * n) for n in lengths])
    return ids(len(lengths), width, seed).masked_fill(mask == 0, 1), mask


def cutter(model, budget=12):
    return CacheCutter(model, FirstLast(2), {i: budget + i for i in full_attention_layers(model)})


def token_by_token(model, cache, turn, mask, count):
    """Greedy text after `turn`, with everything that `generate` could get wrong given by hand."""
    new, places = [], mask.cumsum(1) - 1
    for i in range(turn.shape[1] + count - 1):
        token = turn[:, i : i + 1] if i < turn.shape[1] else new[-1]
        upto = mask[:, : mask.shape[1] - turn.shape[1] - count + 2 + i]
        at = places[:, upto.shape[1] - 1 :][:, :1]
        logits = model(token, past_key_values=cache, attention_mask=upto, position_ids=at).logits[:, -1]
        if i >= turn.shape[1] - 1:
            new.append(logits.argmax(-1, keepdim=True))
    return torch.cat(new, 1)


@pytest.mark.parametrize("custom", [None, loop])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@torch.no_grad()
def test_the_next_turn_goes_on_where_the_last_one_ended(make_model, kind, custom):
    model = make_model(kind)

    @settings(max_examples=12, deadline=None)
    @given(
        st.lists(st.integers(5, 60), min_size=1, max_size=2),
        st.integers(1, 6),
        st.integers(1, 6),
        st.sampled_from([None, 12, 80]),
    )
    def goes_on(lengths, new, turn, budget):
        x, mask = padded(lengths)
        options = {**GREEDY, "custom_generate": custom, "return_dict_in_generate": True}
        with cutter(model, budget) if budget else torch.no_grad():
            first = model.generate(x, attention_mask=mask, max_new_tokens=new, **options)
            more = ids(len(x), turn, seed=1)
            text = torch.cat([first.sequences, more], 1)
            seen = torch.cat([mask, torch.ones(len(x), new + turn, dtype=torch.long)], 1)
            twin, cache = copy.deepcopy(first.past_key_values), first.past_key_values
            assert cache.get_seq_length() == text.shape[1] - turn - 1
            fed = []
            with on_feed(model, lambda feed: fed.append((feed.start, feed.new))):
                second = model.generate(text, attention_mask=seen, past_key_values=cache, max_new_tokens=4, **options)
            assert fed[0] == (text.shape[1] - turn - 1, turn + 1)
            found = second.sequences[:, text.shape[1] :]
            rest = torch.cat([first.sequences[:, -1:], more], 1)
            all_seen = torch.cat([seen, torch.ones(len(x), 3, dtype=torch.long)], 1)
            assert torch.equal(found, token_by_token(model, twin, rest, all_seen, 4))
        if not budget or budget >= x.shape[1]:
            whole = model.generate(text, attention_mask=seen, max_new_tokens=4, **GREEDY)
            assert torch.equal(second.sequences, whole)

    goes_on()


@torch.no_grad()
def test_a_short_cache_is_refused_where_nothing_hides_what_is_gone(llama):
    x = ids(1, 60)
    with cutter(llama):
        out = llama.generate(x, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
    for more in ({}, {"custom_generate": loop}):
        with pytest.raises(InputError, match="lost columns of its 60 prompt tokens"):
            llama.generate(
                torch.cat([out.sequences, x[:, :2]], 1), past_key_values=out.past_key_values, max_new_tokens=2, **more
            )
    assert out.past_key_values.get_seq_length() == 62  # nothing was fed
    with cutter(llama):  # a later context goes on with it
        assert llama.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=2).shape == (1, 65)


@torch.no_grad()
def test_positions_are_those_of_all_tokens_that_were_seen(llama):
    x = ids(1, 60)
    with cutter(llama):
        cache = llama(x, use_cache=True).past_key_values
        right = llama(x[:, :2], past_key_values=copy.deepcopy(cache)).logits
        given = llama(x[:, :2], past_key_values=copy.deepcopy(cache), position_ids=torch.tensor([[60, 61]])).logits
        assert torch.equal(right, given)
        for wrong in ([[12, 13]], [[0, 1]], [[60, 60]]):
            with pytest.raises(InputError, match="after 60 that were seen"):
                llama(x[:, :2], past_key_values=copy.deepcopy(cache), position_ids=torch.tensor(wrong))
        with suppress(llama, [(3, 5)]), pytest.raises(InputError, match="spans cannot be found"):
            llama(x[:, :2], past_key_values=cache)


@torch.no_grad()
def test_rows_of_a_short_cache_may_be_repeated_chosen_and_emptied(llama):
    x, mask = padded([60, 41])
    with cutter(llama):
        cache = llama(x, attention_mask=mask, use_cache=True).past_key_values
        more, seen = ids(2, 2, seed=3), torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
        expected = llama(more, past_key_values=copy.deepcopy(cache), attention_mask=seen).logits
        twice, swapped = copy.deepcopy(cache), copy.deepcopy(cache)
        twice.batch_repeat_interleave(2)
        swapped.batch_select_indices(torch.tensor([1, 0]))
        found = llama(
            more.repeat_interleave(2, 0), past_key_values=twice, attention_mask=seen.repeat_interleave(2, 0)
        ).logits
        assert torch.allclose(found[::2], expected, atol=1e-5) and torch.allclose(found[1::2], expected, atol=1e-5)
        found = llama(more.flip(0), past_key_values=swapped, attention_mask=seen.flip(0)).logits
        assert torch.allclose(found.flip(0), expected, atol=1e-5)
        cache.reset()
        assert cache.get_seq_length() == 0
        llama(x[:, :10], past_key_values=cache)
        assert layer_lengths(cache) == [10] * 4 and cache.get_seq_length() == 10
    assert llama(more, past_key_values=cache).logits.shape[1] == 2  # nothing is missing from it


@torch.no_grad()
def test_layers_that_are_not_cut_see_everything_beside_layers_that_are(llama):
    x, more = ids(1, 60), ids(1, 3, seed=2)
    with CacheCutter(llama, FirstLast(2), {0: 12}):
        one = DynamicCache(config=llama.config)
        llama(x, past_key_values=one)
        together = llama(more, past_key_values=copy.deepcopy(one)).logits
        single = [llama(more[:, i : i + 1], past_key_values=one).logits for i in range(3)]
    assert torch.allclose(together, torch.cat(single, 1), atol=1e-5)
