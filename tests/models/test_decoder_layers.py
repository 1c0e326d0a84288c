"""Where the decoder's blocks are: in the language model, not in a tower as deep, nor in a list of something else."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    JambaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    Qwen2_5_VLConfig,
    XLMConfig,
)

from tokenry.core.errors import InputError
from tokenry.hooks.attention import observe
from tokenry.hooks.layers import mask_layers, skip_layers
from tokenry.hooks.residual import add_to_residual, on_feed
from tokenry.models.anatomy import attention_modules, decoder_layers

DEPTH = 3  # of the tower, too
IDS = torch.tensor([[5, 9, 70, 33, 8]])
TEXT = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": DEPTH}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def llava(config):
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    return config(vision_config=tower, text_config=LlamaConfig(**TEXT), image_token_index=99)


def qwen():
    tower = {"depth": DEPTH, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 32}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    return Qwen2_5_VLConfig(vision_config=tower, text_config={**TEXT, "rope_parameters": rope})


SEEING = {"llava": lambda: llava(LlavaConfig), "llava-next": lambda: llava(LlavaNextConfig), "qwen2.5-vl": qwen}


@pytest.fixture(params=SEEING)
def seeing(request):
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(SEEING[request.param]()).eval()


@torch.no_grad()
def test_the_language_model_is_found_beside_a_tower_as_deep(seeing):
    assert sum(isinstance(m, nn.ModuleList) and len(m) == DEPTH for m in seeing.modules()) >= 2
    assert decoder_layers(seeing) is seeing.model.language_model.layers
    mine = [layer.self_attn for layer in seeing.model.language_model.layers]
    assert attention_modules(seeing) == mine
    plain = states(seeing)
    for layer in range(DEPTH):
        with add_to_residual(seeing, {layer: torch.ones(32)}):
            same = [torch.equal(a, b) for a, b in zip(plain, states(seeing))]
        assert same == [i <= layer for i in range(DEPTH)] + [False]
    calls, feeds = [], []
    with observe(seeing, calls.append), on_feed(seeing, feeds.append), skip_layers(seeing, [0, 2]):
        seeing(IDS)
    assert [call.layer for call in calls] == [0, 2] and [feed.new for feed in feeds] == [5]
    with mask_layers(seeing, torch.zeros(DEPTH, 5, dtype=torch.bool)):
        assert torch.equal(seeing.model.language_model(IDS).last_hidden_state[0, 0], normed(seeing)[0, 0])


def states(model):
    """The input of each block, and the last state."""
    blocks, caught = model.model.language_model.layers, []
    hooks = [block.register_forward_pre_hook(lambda _, args: caught.append(args[0])) for block in blocks]
    last = model.model.language_model(IDS).last_hidden_state
    for hook in hooks:
        hook.remove()
    return [*caught, last]


def normed(model):
    """The embeddings after the last norm: what no layer has touched."""
    return model.model.language_model.norm(model.get_input_embeddings()(IDS))


def test_experts_are_no_layers():
    """As many experts as layers, in lists and in blocks of their own."""
    for config in (MixtralConfig(**TEXT, num_local_experts=DEPTH), JambaConfig(**TEXT, num_experts=DEPTH)):
        model = AutoModelForCausalLM.from_config(config)
        assert decoder_layers(model) is model.model.layers


@torch.no_grad()
def test_a_head_that_is_called_decoder_is_not_asked():
    model = AutoModelForCausalLM.from_config(ModernBertDecoderConfig(**TEXT, pad_token_id=0, bos_token_id=1)).eval()
    feeds = []
    with on_feed(model, feeds.append):
        model(IDS)
    assert decoder_layers(model) is model.model.layers and feeds[0].new == 5


def test_what_is_ambiguous_is_refused(make_model):
    sizes = {"vocab_size": 100, "emb_dim": 32, "n_layers": DEPTH, "n_heads": 4}
    with pytest.raises(InputError, match="no list of 3 decoder layers"):  # attentions, norms, feed-forward parts
        decoder_layers(AutoModelForCausalLM.from_config(XLMConfig(**sizes)))
    model = deepcopy(make_model("llama"))
    model.model.others = deepcopy(model.model.layers)
    with pytest.raises(InputError, match="several lists of 4 decoder layers"):
        decoder_layers(model)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "opt"])
def test_plain_families(kind, make_model):
    model = make_model(kind)
    body = model.model.decoder if kind == "opt" else model.model
    assert decoder_layers(model) is body.layers
    assert attention_modules(model) == [layer.self_attn for layer in body.layers]
