"""A model with adapters of peft is the model that they make: whatever reads its weights or hooks its layers finds what
it finds in the merged one, or refuses."""

from copy import deepcopy

import peft
import pytest
import torch

import tokenry
from tokenry.core.errors import InputError
from tokenry.decode import Spectr, speculative
from tokenry.hooks.layers import skip_layers
from tokenry.hooks.neurons import clamp_neurons
from tokenry.hooks.residual import ablate_heads
from tokenry.learned.dead_end_values import DeadEndValueModel
from tokenry.learned.difficulty_probe import read_questions
from tokenry.models.anatomy import decoder_layers, fingerprint, shape_of, unembedding
from tokenry.models.masks import check_mask
from tokenry.read import LMHeadNeurons
from tokenry.read.weights.directions import neuron_rows
from tokenry.represent import PromptEmbedder, TokenPrepending
from tokenry.select import CompressKV, HeadProfile, identify_retrieval_heads, layer_eviction_error, make_needle_prompts
from tokenry.trace.trace import capture

IDS = torch.tensor([[5, 9, 70, 33, 8, 41, 77]])
TEXTS = ["the old lighthouse stood", "a whisper in the night."]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# --- ways to wrap --------------------------------------------------------------------------------------------------


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": PROJECTIONS, **options})


def stir(model):
    """Adapters begin with no effect: give them one."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def wrapped(model, *configs):
    made = peft.get_peft_model(model, configs[0], adapter_name="one")
    for number, config in enumerate(configs[1:]):
        made.add_adapter(f"more{number}", config)
    made.base_model.set_adapter(list(made.peft_config))
    return stir(made)


def everywhere(model):
    return wrapped(model, lora(target_modules=[*PROJECTIONS, "lm_head", "embed_tokens"]))


def two_at_once(model):
    return wrapped(model, lora(), lora(r=2, target_modules=["up_proj", "down_proj", "o_proj"]))


def a_head_of_its_own(model):
    return wrapped(model, lora(modules_to_save=["lm_head", "norm"]))


def without_wrapper(model):
    """transformers puts adapters into a model that stays what it is."""
    model.add_adapter(lora())
    return stir(model)


def merged_in_place(model):
    made = everywhere(model)
    made.merge_adapter()
    return made


WAYS = [everywhere, two_at_once, a_head_of_its_own, without_wrapper, merged_in_place]


def merged(model):
    """The plain model that an adapted one computes."""
    if isinstance(model, peft.PeftModel):
        return deepcopy(model).merge_and_unload().eval()
    plain = deepcopy(model)
    for layer in (part for part in plain.modules() if hasattr(part, "base_layer")):
        layer.merge()
    return plain


# --- whoever reads weights or hooks layers -------------------------------------------------------------------------


def maps(model, tokenizer):
    tensors = LMHeadNeurons(top_k=3).map(model, tokenizer).tensors
    return [tensors["ids"].long(), tensors["logits"], tensors["lse"]]


def directions(model, tokenizer):
    return [neuron_rows(model, 2, side, fold) for side in ("up", "gate", "down") for fold in (False, True)] + [
        unembedding(model)
    ]


def embeddings(model, tokenizer):
    return [PromptEmbedder(model, tokenizer, output_layer=k).encode(TEXTS) for k in (-1, 2)]


def prepended(model, tokenizer):
    return [TokenPrepending(slot_init=s).encoder(model, tokenizer).encode(TEXTS) for s in ("normal", "mean", "zeros")]


def traces(model, tokenizer):
    with capture(model, tokenizer, hidden=[0, 2, 4], head_outputs=[3], neurons="all", qk="all") as cap, torch.no_grad():
        model(IDS, use_cache=False)
    return [cap.trace.logits(), *(cap.trace.hidden(i) for i in (0, 2, 4))]


def clamped(model, tokenizer):
    outputs = []
    for side in ("product", "up"):
        with clamp_neurons(model, {1: {3: 2.0}}, side), torch.no_grad():
            outputs.append(model(IDS).logits)
    return outputs


def ablated(model, tokenizer):
    with ablate_heads(model, {1: [0, 2]}), skip_layers(model, [0, 1, 3]), torch.no_grad():
        return [model(IDS).logits]


def compressed(model, tokenizer):
    order = ((2, 0, 1, 3), (1, 3, 0, 2), (0, 1, 2, 3), (3, 2, 1, 0))
    profile = HeadProfile(model="tiny", fingerprint=fingerprint(model), **shape_of(model), order=order)
    ids = torch.arange(2, 72)[None]
    with CompressKV(profile=profile, budget=24, min_tokens=12, top_heads=2, adaptive=False)(model):
        new = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return [new]


def evicted(model, tokenizer):
    prompts = make_needle_prompts(tokenizer, 1, 350, seed=5)
    profile = identify_retrieval_heads(model, tokenizer, prompts, teacher_forced=True)
    return [torch.tensor(profile.scores), layer_eviction_error(model, tokenizer, prompts, profile, top_heads=2)]


def drafted(model, tokenizer):
    method = Spectr(drafter="early-exit", exit_layers=2, verifier="greedy", num_drafts=1)
    out = tokenry.generate(model, tokenizer, "the sea", chat=False, max_new_tokens=8, methods=[method])
    return [torch.tensor(out.new_ids)]


def questions(model, tokenizer):
    return [read_questions(model, tokenizer, TEXTS, chat=False).states]


READERS = [maps, directions, embeddings, prepended, traces, clamped, ablated, compressed, evicted, drafted, questions]


@pytest.fixture(scope="module")
def pairs():
    return {}


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def pair(request, make_model, pairs):
    """A model with adapters, and the plain model that they make."""
    if request.param not in pairs:
        adapted = request.param(deepcopy(make_model("llama")))
        pairs[request.param] = (adapted, merged(adapted))
    return pairs[request.param]


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_it_is_what_the_merged_model_gives(read, pair, tokenizer, make_model):
    adapted, plain = pair
    found, expected, base = (read(model, tokenizer) for model in (adapted, plain, make_model("llama")))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert any(a.shape != b.shape or not torch.allclose(a, b, atol=1e-3) for a, b in zip(found, base))


def test_masks_are_probed_and_drafts_made_with_it(pair, tokenizer):
    """Both ask for the embeddings, or for the class of the model."""
    adapted, _ = pair
    check_mask(adapted, torch.ones(1, 1, 4, 4, dtype=torch.bool).tril())
    options = {"do_sample": False, "max_new_tokens": 6, "attention_mask": torch.ones_like(IDS)}
    plain = adapted.generate(input_ids=IDS, **options)
    drafts = {"custom_generate": speculative, "drafter": adapted, "verifier": "greedy", "num_drafts": 1}
    assert torch.equal(adapted.generate(input_ids=IDS, **drafts, **options), plain)


def test_an_adapter_that_is_off_changes_nothing(make_model, tokenizer):
    adapted = everywhere(deepcopy(make_model("llama")))
    on = fingerprint(adapted)
    with adapted.disable_adapter():
        assert torch.equal(unembedding(adapted), unembedding(make_model("llama")))
        assert fingerprint(adapted) != on  # what was made for one is not taken for the other
    assert not torch.equal(unembedding(adapted), unembedding(make_model("llama")))


@pytest.mark.parametrize(
    "config", [lora(use_dora=True), peft.IA3Config(target_modules=["up_proj"], feedforward_modules=[])]
)
def test_other_adapters_are_refused(config, make_model, tokenizer):
    adapted = wrapped(deepcopy(make_model("llama")), config)
    with pytest.raises(InputError, match=r"whose change of the weight is not a sum; call merge_and_unload\(\)"):
        neuron_rows(adapted, 1, "up")
    plain = adapted.merge_and_unload()
    torch.testing.assert_close(neuron_rows(plain, 1, "up"), plain.model.layers[1].mlp.up_proj.weight)


def test_merged_and_off_at_once_is_refused(make_model):
    adapted = merged_in_place(deepcopy(make_model("llama")))
    with adapted.disable_adapter(), pytest.raises(InputError, match="merge_and_unload"):
        unembedding(adapted)


def test_virtual_tokens_are_refused(make_model, tokenizer):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(deepcopy(make_model("llama")), config)
    for use in (PromptEmbedder, lambda m, t: TokenPrepending().encoder(m, t), lambda m, t: decoder_layers(m)):
        with pytest.raises(InputError, match="virtual tokens before each text"):
            use(tuned, tokenizer)


def test_a_trunk_with_adapters_is_refused(make_model):
    adapted = everywhere(deepcopy(make_model("llama")))
    with pytest.raises(InputError, match="adapters, which are not saved with it"):
        DeadEndValueModel(adapted)
    assert DeadEndValueModel(adapted.merge_and_unload()).vocab_size == 320
