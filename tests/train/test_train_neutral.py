"""With its neutral setting a trainer's loss is the plain one, bit for bit.

SkipDecode at full depth is in test_skipdecode.py. FTPO has no setting that is another trainer's loss: it is held
against its definition in test_ftpo.py, and here against what is left of it where the policy is the reference.
"""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from tokenry.learned.confidence_filter import ConfidenceFilter, TraceDataset
from tokenry.models.masks import as_attention_mask, block_diffusion_mask, make_bidirectional
from tokenry.train import final_token_dpo_loss, ftpo_loss, masked_diffusion_loss, sarsa_loss, tidar_loss
from tokenry.train.filters.loss import filter_loss

V, MASK = 24, 23


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=V, **sizes)).eval()


def ids(rows=4, time=8):
    return torch.randint(0, 20, (rows, time), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_with_everything_hidden_masked_diffusion_is_cross_entropy(model):
    """4 rows of 8: dividing by powers of two rounds nothing."""
    found = masked_diffusion_loss(make_bidirectional(model), ids(), MASK, eps=1 - 1e-12)
    logits = model(torch.full_like(ids(), MASK)).logits
    assert torch.equal(found, cross_entropy(logits.flatten(0, 1), ids().flatten(), reduction="none").sum() / 32)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [0.0, 2.0**64])
def test_tidar_without_one_of_its_halves_is_cross_entropy(model, alpha):
    """alpha 0 leaves the masks alone, a large one the text alone: then it is the parent's loss on the same logits."""
    loss, text, masks = tidar_loss(model, ids(), MASK, 4, alpha=alpha)
    mask = as_attention_mask(model, block_diffusion_mask(8, 4))
    both = torch.cat([ids(), torch.full_like(ids(), MASK)], 1)
    logits = model(both, attention_mask=mask, position_ids=torch.arange(8).repeat(2)[None]).logits
    assert torch.equal(text, cross_entropy(logits[:, :7].flatten(0, 1), ids()[:, 1:].flatten()))
    assert torch.equal(masks, cross_entropy(logits[:, 12:].flatten(0, 1), ids()[:, 4:].flatten()))
    assert torch.equal(loss, masks if alpha == 0 else text)
    plain = model(ids(), labels=ids()).loss  # without masks behind the text, which it does not see
    assert float(text) == pytest.approx(float(plain), abs=1e-6)


def test_without_what_comes_after_sarsa_is_the_squared_error_of_the_reward():
    draw = torch.Generator().manual_seed(0)
    q, target = (-torch.rand(2, 4, 8, 20, generator=draw)).unbind(0)
    rewards = -torch.rand(4, 8, generator=draw)
    found = sarsa_loss(q, target, ids(), rewards, torch.ones(4, 8), gamma=0.0)
    taken = q[:, :-1].gather(-1, ids()[:, 1:, None])[..., 0]
    assert torch.equal(found, (taken - rewards[:, 1:]).square().sum() / 32)


def test_over_all_positions_the_loss_of_a_filter_is_binary_cross_entropy():
    torch.manual_seed(0)
    made, conf = ConfidenceFilter(8), torch.rand(16, 8)
    traces = TraceDataset(conf, conf > 0.5, torch.ones(16, 8, dtype=torch.bool), torch.arange(16))
    plain = binary_cross_entropy_with_logits(made(conf), traces.label.float())
    for mask_loss in (False, True):  # all are masked
        assert torch.equal(filter_loss(made, traces, mask_loss), plain)


def test_at_the_reference_nothing_is_tied_and_dpo_is_the_logarithm_of_two():
    logits = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    targets = (torch.tensor([[1, 2]] * 4), torch.tensor([[True, True]] * 4), torch.tensor([3, 4, 5, 6]))
    found = ftpo_loss(logits, logits, *targets, lambda_aggregate=1.0, tau_target=0.0, tau_aggregate=0.0)
    assert torch.equal(found.loss, found.pref)
    assert float(found.nontarget) == float(found.target) == float(found.aggregate) == 0.0
    assert torch.equal(final_token_dpo_loss(logits, logits, *targets), torch.tensor(2.0).log())
