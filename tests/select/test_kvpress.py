"""The kvpress press. Runs where kvpress is installed (see the docstring of tokenry.select.adapters.kvpress)."""

import pytest
import torch

pytest.importorskip("kvpress", reason="kvpress is not installed; it needs its own environment with transformers < 5.3")

from tokenry.core.errors import InputError
from tokenry.models.anatomy import fingerprint, shape_of
from tokenry.select.adapters.kvpress import CompressKVPress
from tokenry.select.heads.profile import HeadProfile

ORDER = ((2, 0, 1, 3), (1, 3, 0, 2), (0, 1, 2, 3), (3, 2, 1, 0))


@pytest.fixture
def profile(llama):
    return HeadProfile(
        model="tiny", fingerprint=fingerprint(llama), **shape_of(llama), order=ORDER, error=(4.0, 1.0, 2.0, 1.0)
    )


def prompt(length):
    return torch.randint(2, 320, (1, length), generator=torch.Generator().manual_seed(1))


def test_budgets_above_the_prompt_change_nothing(llama, profile):
    ids = prompt(40)
    plain = llama.generate(ids, max_new_tokens=8, do_sample=False)
    with CompressKVPress(profile=profile, budget=120, max_factor=1, adaptive=False)(llama):
        assert torch.equal(llama.generate(ids, max_new_tokens=8, do_sample=False), plain)


def test_keeps_what_the_eager_attention_weights_say(llama, profile):
    ids, w, kernel, top = prompt(60), 8, 5, 2
    llama.set_attn_implementation("eager")
    try:
        full = llama(ids, output_attentions=True, use_cache=True)
    finally:
        llama.set_attn_implementation("sdpa")
    press = CompressKVPress(profile=profile, budget=20, top_heads=top)
    with torch.no_grad(), press(llama):
        cache = llama(ids, use_cache=True).past_key_values
    assert sum(press.budgets) == 4 * 20 and len(set(press.budgets)) > 1
    for layer, (weights, budget) in enumerate(zip(full.attentions, press.budgets)):
        rows = weights[0, list(ORDER[layer][:top]), -w:, : 60 - w].sum(1)
        pooled = torch.nn.functional.avg_pool1d(rows, kernel, 1, kernel // 2).mean(0)
        kept = [*pooled.topk(budget - w).indices.sort().values.tolist(), *range(60 - w, 60)]
        expected = full.past_key_values.layers[layer].keys[:, :, kept]
        torch.testing.assert_close(cache.layers[layer].keys, expected, atol=1e-5, rtol=1e-5)


def test_generates_with_unequal_layers(llama, profile):
    ids = prompt(60)
    with CompressKVPress(profile=profile, budget=20)(llama):
        assert llama.generate(ids, max_new_tokens=8, do_sample=False).shape == (1, 68)


def test_refusals(llama, profile):
    with pytest.raises(InputError, match="needs profile"):
        CompressKVPress(budget=32)
    with pytest.raises(InputError, match="above window_size=8"):
        CompressKVPress(profile=profile, budget=8)
    other = profile.model_copy(update={"fingerprint": "0" * 16})
    with pytest.raises(InputError, match="not for the weights given"), CompressKVPress(profile=other)(llama):
        pass
