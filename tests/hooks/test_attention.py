"""Observing and editing attention: exact against eager, nothing left behind."""

import copy

import pytest
import torch
from support.attention import KINDS, LENGTH, assert_clean, eager, left_padded, random_ids

from tokenry.core.errors import InputError
from tokenry.hooks.attention import edit_mask, observe, suppress


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_observing_changes_nothing_and_matches_eager(make_model, kind):
    model, (ids, mask) = make_model(kind), left_padded()
    plain = model(ids, attention_mask=mask).logits
    reference = eager(model)(ids, attention_mask=mask, output_attentions=True)
    seen = {}
    with observe(model, lambda call: seen.update({call.layer: call.rows()})):
        watched = model(ids, attention_mask=mask).logits
    assert torch.equal(plain, watched)
    live = mask.bool()
    assert (watched - reference.logits)[live].abs().max() < 1e-4
    for layer, maps in seen.items():
        wrong = (maps - reference.attentions[layer]).transpose(1, 2)[live]
        assert wrong.abs().max() < 1e-5, (kind, layer)
    assert_clean(model)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rows_are_rows_of_the_whole_map(make_model, kind):
    model, ids = make_model(kind), random_ids(2)
    rows, heads = torch.tensor([3, 17, 39]), torch.tensor([3, 0])

    def check(call):
        whole = call.rows()
        assert torch.allclose(call.rows(rows, heads), whole[:, heads][:, :, rows], atol=1e-6)
        assert torch.allclose(call.rows(slice(-2, None)), whole[:, :, -2:], atol=1e-6)
        assert torch.allclose(whole.sum(-1), torch.ones(()), atol=1e-5)

    with observe(model, check):
        model(ids)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_decode_steps_see_the_rows_of_the_full_forward(make_model, kind):
    model, ids = make_model(kind), random_ids()
    full, steps = {}, {}
    with observe(model, lambda call: full.update({call.layer: call.rows()})):
        model(ids)
    with observe(model, lambda call: steps.setdefault(call.layer, []).append(call.rows())):
        cache = model(ids[:, :30]).past_key_values
        for i in range(30, LENGTH):
            model(ids[:, i : i + 1], past_key_values=cache)
    for layer, parts in steps.items():
        for i, row in zip(range(30, LENGTH), parts[1:]):
            keys = row.shape[-1]  # a sliding layer holds only the last 16 of i + 1 keys
            assert torch.allclose(row[0, :, 0], full[layer][0, :, i, i + 1 - keys : i + 1], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_do_not_change(make_model, kind):
    model, (ids, mask) = make_model(kind), left_padded()
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    plain, count = model.generate(ids, **options), []
    with observe(model, lambda call: count.append(call.layer)):
        assert torch.equal(plain, model.generate(ids, **options))
    assert len(count) == 4 * 12


@torch.no_grad()
def test_observers_nest_and_close_in_turn(llama):
    ids, outer, inner = random_ids(), [], []
    with observe(llama, lambda call: outer.append(call.layer)):
        with observe(llama, lambda call: inner.append(call.layer)):
            llama(ids)
        assert llama.config._attn_implementation == "tokenry"
        llama(ids)
    llama(ids)
    assert inner == [0, 1, 2, 3] and outer == inner * 2
    assert_clean(llama)


@torch.no_grad()
def test_observers_see_what_editors_made_in_either_order(llama):
    ids, seen = random_ids(), []

    def watch():
        return observe(llama, lambda call: seen.append(float(call.rows()[:, :, 20:, 5:9].amax())))

    with watch(), suppress(llama, [(5, 9)], layers={1}):
        llama(ids)
    inside = list(seen)
    seen.clear()
    with suppress(llama, [(5, 9)], layers={1}), watch():
        llama(ids)
    assert inside == seen and [weight == 0 for weight in seen] == [False, True, False, False]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_suppression_equals_deletion_with_a_position_gap(make_model, kind):
    model = make_model(kind)
    length = 15 if kind == "gemma3" else LENGTH  # a window counts columns, so deleting would shift it
    ids, (start, stop) = random_ids(length=length), (4, 9)
    kept = torch.cat([torch.arange(start), torch.arange(stop, length)])
    with suppress(model, [(start, stop)]):
        hidden = model(ids).logits[:, stop:]
    # the mask says that the gap does not begin another packed sequence
    deleted = model(ids[:, kept], position_ids=kept[None], attention_mask=torch.ones(1, len(kept))).logits[:, start:]
    assert (hidden - deleted).abs().max() < 1e-4
    assert (hidden - model(ids).logits[:, stop:]).abs().max() > 1e-3


@pytest.mark.parametrize("heads", [None, torch.tensor([1, 3])])
@torch.no_grad()
def test_each_row_loses_its_own_span(llama, heads):
    ids, spans = random_ids(), [(2, 6), (10, 12), (7, 8)]
    alone = []
    for span in spans:
        with suppress(llama, [span], {0, 2}, heads):
            alone.append(llama(ids).logits)
    with suppress(llama, spans, {0, 2}, heads, each=True):
        together = llama(ids.expand(3, -1)).logits
    torch.testing.assert_close(together, torch.cat(alone))
    with pytest.raises(InputError, match="3 spans for a batch of 2"), suppress(llama, spans, each=True):
        llama(ids.expand(2, -1))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_suppression_is_the_same_in_cached_steps(make_model, kind):
    model, ids = make_model(kind), random_ids()
    with suppress(model, [(20, 34)]):
        full = model(ids).logits[0, 30:]
        cache, steps = model(ids[:, :30]).past_key_values, []
        for i in range(30, LENGTH):
            steps.append(model(ids[:, i : i + 1], past_key_values=cache).logits[0, -1])
    assert (full - torch.stack(steps)).abs().max() < 1e-4


@torch.no_grad()
def test_suppression_of_chosen_layers_and_heads_nests(llama):
    ids, maps = random_ids(), {}
    with (
        suppress(llama, [(2, 6)], layers={0}),
        suppress(llama, [(10, 12)], layers={0, 2}, heads=torch.tensor([1, 3])),
        suppress(llama, [(7, 8)]),
        observe(llama, lambda call: maps.update({call.layer: call.rows()[0]})),
    ):
        llama(ids)
    own_out = 20  # later rows only: a token always sees itself
    assert maps[0][:, own_out:, 2:6].max() == 0 and maps[1][:, own_out:, 2:6].max() > 0
    assert maps[2][[1, 3], own_out:, 10:12].max() == 0 and maps[2][[0, 2], own_out:, 10:12].max() > 0
    assert all(m[:, own_out:, 7].max() == 0 for m in maps.values())
    assert_clean(llama)


@torch.no_grad()
def test_an_editor_that_returns_the_mask_changes_nothing(make_model):
    model, ids = make_model("gemma3"), random_ids()
    with edit_mask(model, lambda call: call.mask):
        assert torch.equal(model(ids).logits, (edited := model(ids).logits))
    assert torch.equal(edited, model(ids).logits)


@torch.no_grad()
def test_everything_is_gone_after_an_error(llama):
    ids = random_ids()
    plain = llama(ids).logits

    def broken(call):
        raise RuntimeError("broken observer")

    with pytest.raises(RuntimeError, match="broken"), suppress(llama, [(1, 3)]), observe(llama, broken):
        llama(ids)
    assert_clean(llama)
    assert torch.equal(plain, llama(ids).logits)


@pytest.mark.parametrize("name", ["eager", "flash_attention_2"])
def test_other_attention_implementations_are_refused(llama, name):
    twin = copy.deepcopy(llama)
    twin.config._attn_implementation_internal = name  # flash cannot be installed here
    with pytest.raises(InputError, match=f"{name}.*sdpa"), observe(twin, print):
        pass


def test_a_compiled_model_is_refused(llama):
    with pytest.raises(InputError, match="compiled"), observe(torch.compile(llama), print):
        pass


def test_a_model_that_caps_its_scores_is_refused(make_model):
    model = copy.deepcopy(make_model("gemma3"))
    model.config.attn_logit_softcapping = 50.0
    with pytest.raises(InputError, match="caps its attention"), observe(model, print):
        pass
