"""Editing inside a forward: exact effect, nesting, nothing left behind."""

import copy
from contextlib import contextmanager

import pytest
import torch
from support.attention import KINDS, assert_clean, random_ids

from tokenry.core.errors import InputError
from tokenry.hooks.layers import skip_layers
from tokenry.hooks.neurons import clamp_neurons
from tokenry.hooks.residual import (
    ablate_heads,
    add_to_residual,
    capture_residual,
    edit_inputs,
    edit_outputs,
    edit_residual,
    on_feed,
    patch_resid,
)
from tokenry.models.anatomy import decoder_layers, fingerprint, gated_mlp


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_residuals_are_the_models_hidden_states(make_model, kind):
    model, ids = make_model(kind), random_ids(2)
    with capture_residual(model, [0, 2]) as caught:
        states = model(ids, output_hidden_states=True).hidden_states
    assert torch.equal(caught[0][0], states[1]) and torch.equal(caught[2][0], states[3])
    assert_clean(model)


@torch.no_grad()
def test_edits_of_one_layer_apply_in_order_and_a_zero_vector_is_neutral(llama):
    ids, plain = random_ids(), llama(random_ids()).logits
    with add_to_residual(llama, {1: torch.zeros(32)}):
        assert torch.equal(plain, llama(ids).logits)
    with (
        edit_residual(llama, {1: lambda h: h + 1}),
        edit_residual(llama, {1: lambda h: h * 2}),
        capture_residual(llama, [1]) as caught,
    ):
        llama(ids)
    with capture_residual(llama, [1]) as before:
        llama(ids)
    assert torch.allclose(caught[1][0], (before[1][0] + 1) * 2)


@pytest.mark.parametrize("kind", [*KINDS, "opt"])
@torch.no_grad()
def test_ablated_heads_equal_zero_columns_of_the_output_projection(make_model, kind):
    model, ids = make_model(kind), random_ids()
    with ablate_heads(model, {1: [0, 3]}), ablate_heads(model, {2: [1]}):
        ablated = model(ids).logits
    twin = copy.deepcopy(model)
    for layer, heads in ((1, [0, 3]), (2, [1])):
        attention = decoder_layers(twin)[layer].self_attn
        mixer = getattr(attention, "o_proj", None) or attention.out_proj
        for head in heads:
            mixer.weight[:, head * 8 : head * 8 + 8] = 0
    assert (ablated - twin(ids).logits).abs().max() < 1e-5
    with ablate_heads(model, {1: []}):
        assert torch.equal(model(ids).logits, (plain := model(ids).logits))
    assert (ablated - plain).abs().max() > 1e-3
    assert_clean(model)


@torch.no_grad()
def test_clamped_neurons_have_their_value(llama):
    ids, down = random_ids(), decoder_layers(llama)[2].mlp.down_proj
    seen = []
    with clamp_neurons(llama, {2: {5: 1.5, 9: 0.0}}), clamp_neurons(llama, {2: {5: -2.0}}):
        handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        llama(ids)
        handle.remove()
    assert (seen[0][..., 5] == -2).all() and (seen[0][..., 9] == 0).all() and (seen[0][..., 6] != 0).any()
    assert_clean(llama)


@torch.no_grad()
def test_a_clamped_up_projection_is_still_gated(llama):
    ids, mlp = random_ids(), decoder_layers(llama)[2].mlp
    seen = []
    watch = {mlp.down_proj: lambda m: seen.append(m) or m}
    gate = []
    with (
        clamp_neurons(llama, {2: {5: 20.0, 9: -3.0}}, side="up"),
        edit_outputs(llama, {mlp.gate_proj: lambda g: gate.append(g) or g}),
        edit_inputs(llama, watch),
    ):
        llama(ids)
    held = torch.nn.functional.silu(gate[0])
    assert torch.allclose(seen[0][..., 5], 20 * held[..., 5]) and torch.allclose(seen[0][..., 9], -3 * held[..., 9])
    twin = copy.deepcopy(llama)
    twin.model.layers[2].mlp.down_proj.weight[:, 7] = 0
    with clamp_neurons(llama, {2: {7: 0.0}}), clamp_neurons(llama, {1: {}}, side="up"):
        assert torch.allclose(llama(ids).logits, twin(ids).logits, atol=1e-5)
    assert_clean(llama)


@contextmanager
def watched(model, side):
    """What the clamp of layer 1 leaves behind, one tensor per forward."""
    seen = []
    if side == "up":
        watch = edit_outputs(model, {gated_mlp(model, 1)["up"].module: lambda u: seen.append(u) or u})
    else:
        watch = edit_inputs(model, {decoder_layers(model)[1].mlp.down_proj: lambda m: seen.append(m) or m})
    with watch:
        yield seen


@pytest.mark.parametrize("side", ["product", "up"])
@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_clamps_act_at_generated_positions_only(llama, side, cached):
    ids = random_ids(2)[:, :12]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "use_cache": cached}
    with clamp_neurons(llama, {1: {3: 50.0}}, side, "generated"), watched(llama, side) as seen:
        llama.generate(ids, **options)
        llama.generate(ids.flip(1), **options)  # another prompt starts over
    first, rest = seen[0], seen[1:4]
    assert not (first[..., 3] == 50).any() and not (seen[4][..., 3] == 50).any()
    for step in rest:
        new = step[..., 3] == 50
        assert new[:, -1].all() and (cached or (not new[:, :12].any() and new[:, 12:].all()))
    cache = llama(ids).past_key_values
    with clamp_neurons(llama, {1: {3: 50.0}}, side, "generated"), watched(llama, side) as again:
        llama(ids[:, :2], past_key_values=cache)  # what the cache held before is the prompt
    assert (again[0][..., 3] == 50).all()
    assert_clean(llama)


@torch.no_grad()
def test_clamps_act_where_a_mask_says(llama):
    ids, seen = random_ids(2), []
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0, 4] = mask[1, 29] = True
    watch = edit_inputs(llama, {decoder_layers(llama)[1].mlp.down_proj: lambda m: seen.append(m) or m})
    with clamp_neurons(llama, {1: {3: 7.0}}, positions=mask), watch:
        cache = llama(ids[:, :20]).past_key_values
        llama(ids[:, 20:], past_key_values=cache)  # beyond the mask nothing is held
    held = torch.cat(seen, 1)[..., 3] == 7
    assert held.nonzero().tolist() == [[0, 4], [1, 29]]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_patching_everything_transplants_a_run(make_model, kind):
    model, ids, other = make_model(kind), random_ids(2)[:1], random_ids(2)[1:]
    with capture_residual(model, [2]) as caught:
        wanted = model(other).logits
    source = caught[2][0][0]
    with patch_resid(model, 2, range(len(source)), source):
        assert torch.equal(wanted, model(ids).logits)
    with (
        patch_resid(model, 2, [7], source[7]),
        patch_resid(model, 2, [3, 9], source[[3, 9]]),
        capture_residual(model, [2]) as patched,
    ):
        model(ids)
    with capture_residual(model, [2]) as plain:
        model(ids)
    changed = (patched[2][0] != plain[2][0]).any(-1)[0].nonzero().squeeze(1).tolist()
    assert changed == [3, 7, 9] and torch.equal(patched[2][0][0, [3, 7, 9]], source[[3, 7, 9]])


@torch.no_grad()
def test_patches_stay_where_they_are_in_cached_steps(llama):
    ids, value = random_ids(), torch.ones(32)
    with patch_resid(llama, 1, [4, 33], value):
        full = llama(ids).logits[0, 30:]
        cache, steps = llama(ids[:, :30]).past_key_values, []
        for i in range(30, ids.shape[1]):
            steps.append(llama(ids[:, i : i + 1], past_key_values=cache).logits[0, -1])
    assert (full - torch.stack(steps)).abs().max() < 1e-4


@torch.no_grad()
def test_feeds_count_columns(llama):
    feeds, ids = [], random_ids(2)
    with on_feed(llama, feeds.append):
        cache = llama(ids, attention_mask=torch.ones_like(ids)).past_key_values
        llama(ids[:, :3], past_key_values=cache)
    assert [(f.start, f.stop) for f in feeds] == [(0, 40), (40, 43)]
    assert torch.equal(feeds[0].ids, ids) and feeds[0].mask.shape == (2, 40) and feeds[1].mask is None


@torch.no_grad()
def test_everything_is_gone_after_an_error(llama):
    ids, plain = random_ids(), llama(random_ids()).logits
    layers = list(decoder_layers(llama))
    with (
        pytest.raises(RuntimeError, match="stop"),
        ablate_heads(llama, {0: [1]}),
        clamp_neurons(llama, {1: {2: 3.0}}),
        patch_resid(llama, 2, [0], torch.zeros(32)),
        skip_layers(llama, {0, 1}),
    ):
        raise RuntimeError("stop")
    assert list(decoder_layers(llama)) == layers
    assert_clean(llama)
    assert torch.equal(plain, llama(ids).logits)


def test_what_does_not_exist_is_refused(llama, make_model):
    with pytest.raises(InputError, match=r"layer 4 .* 0 to 3"), edit_residual(llama, {4: abs}):
        pass
    with pytest.raises(InputError, match=r"head 4 .* 0 to 3"):
        ablate_heads(llama, {0: [4]})
    with pytest.raises(InputError, match="layer 9"):
        ablate_heads(llama, {9: [0]})
    with pytest.raises(InputError, match=r"neuron 64 .* 0 to 63"):
        clamp_neurons(llama, {0: {64: 0.0}})
    with pytest.raises(InputError, match="down_proj"):
        clamp_neurons(make_model("opt"), {0: {0: 0.0}})
    with pytest.raises(InputError, match="side='gate'"):
        clamp_neurons(llama, {0: {0: 0.0}}, side="gate")
    for positions in ("some", torch.ones(3)):
        with pytest.raises(InputError, match="boolean"):
            clamp_neurons(llama, {0: {0: 0.0}}, positions=positions)
    with pytest.raises(InputError, match="not inputs_embeds"), clamp_neurons(llama, {0: {0: 1.0}}, "up", "generated"):
        llama(inputs_embeds=torch.zeros(1, 3, 32))
    assert_clean(llama)


@torch.no_grad()
def test_the_fingerprint_follows_the_weights(llama, make_model):
    twin = copy.deepcopy(llama)
    assert fingerprint(twin) == fingerprint(llama) != fingerprint(make_model("qwen2"))
    assert fingerprint(copy.deepcopy(llama).to(torch.bfloat16)) == fingerprint(llama)
    for name in dict(llama.named_parameters()):  # whatever was trained, if only one matrix
        twin = copy.deepcopy(llama)
        twin.get_parameter(name).mul_(1.1)
        assert fingerprint(twin) != fingerprint(llama), name
