"""Kinds of models, vision-language checkpoints with their processors, and models that work beside others."""

import copy
import gc
import inspect
import weakref

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperModel,
)
from transformers.utils import is_vision_available

from tokenry import InputError, load
from tokenry.models.kinds import kind_of
from tokenry.models.load import Loaded, shared
from tokenry.models.masks import make_bidirectional

TWO_SIDES = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1}
TWO_SIDES |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
WIDE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def saved(tmp_path, tokenizer):
    """saved(model): its folder, with the tokenizer."""

    def save(model):
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def tiny_llama(seed=0, **more):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**WIDE, vocab_size=320, max_position_embeddings=64, eos_token_id=0, **more))


# --- kinds ---------------------------------------------------------------------------------------------------------

KINDS = {
    "causal": "llama qwen2 gemma3_text gpt2 opt mixtral qwen3_next jamba recurrent_gemma bamba gpt_neox trocr xlnet",
    "vision_language": "llava qwen2_5_vl qwen3_vl gemma3 idefics3 paligemma internvl mllama",
    "vision": "vit clip clip_vision_model siglip siglip_vision_model dinov2 swin convnext timesformer videomae",
    "ssm": "mamba mamba2 falcon_mamba rwkv xlstm",
    "embedding": "bert roberta modernbert distilbert mpnet deberta-v2 electra bert-generation xlm-roberta nomic_bert",
    "seq2seq": "t5 mt5 bart mbart pegasus marian whisper m2m_100 florence2 vision-encoder-decoder",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_configuration_says_the_kind(kind):
    found = {name: kind_of(CONFIG_MAPPING[name]()) for name in KINDS[kind].split()}
    assert found == dict.fromkeys(found, kind)


def test_what_sees_both_sides_and_is_no_encoder_denoises():
    assert kind_of(make_bidirectional(tiny_llama()).config) == "denoiser"


@pytest.mark.parametrize("name", ["bert", "roberta", "rembert"])
def test_an_encoder_made_a_decoder_is_causal(name):
    assert kind_of(CONFIG_MAPPING[name](is_decoder=True)) == "causal"


def test_the_recurrent_models_are_those_without_a_cache_of_keys():
    """As measured: what their forwards carry from step to step."""
    states = {}
    for config, model in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        if {"cache_params", "state"} & set(inspect.signature(model.forward).parameters):
            states[config.model_type] = kind_of(config())
    assert len(states) == 5 and set(states.values()) == {"ssm"}


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: WhisperModel(WhisperConfig(**TWO_SIDES, vocab_size=320, **TOKENS)), "seq2seq"),
        (lambda: ViTModel(ViTConfig(**WIDE, image_size=4, patch_size=2)), "vision"),
    ],
)
def test_kinds_that_no_method_takes_are_refused_by_name(make, said, saved):
    folder = saved(make())
    with pytest.raises(InputError, match=rf"model but of the kind {said} \(\w+\), which no method takes"):
        load(folder)


def test_a_model_that_translates_loads_whole(saved):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(d_model=8, d_ff=8, num_layers=1, d_kv=4, num_heads=2, vocab_size=320, decoder_start_token_id=0)
    ).eval()
    folder = saved(model)
    loaded = load(folder)
    assert loaded.kind == "seq2seq"
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[0, 9]])}
    with torch.no_grad():
        assert torch.equal(loaded.model(**inputs).logits, model(**inputs).logits)
    del model.decoder.block[0].layer[1]
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"the weights are not those of the T5ForConditionalGeneration .*it lacks"):
        load(folder)


def test_loaded_is_a_pair_that_knows_more(saved):
    loaded = load(saved(tiny_llama()))
    model, tokenizer = loaded
    assert (model, tokenizer) == (loaded.model, loaded.tokenizer) == (loaded[0], loaded[1]) and len(loaded) == 2
    assert loaded.processor is tokenizer and loaded.kind == "causal"
    assert copy.copy(loaded) == loaded
    denoiser = load("zoo/denoiser")
    assert denoiser.kind == copy.copy(denoiser).kind == "denoiser"


# --- vision and language -------------------------------------------------------------------------------------------


def tiny_llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**WIDE, image_size=8, patch_size=4, projection_dim=16)
    text = LlamaConfig(**WIDE, vocab_size=320, max_position_embeddings=64, eos_token_id=0)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=319, vision_feature_select_strategy="full")
    ).eval()


def test_a_vision_language_model_loads_whole(saved):
    model = tiny_llava()
    loaded = load(saved(model))
    assert loaded.kind == "vision_language" and loaded.processor is loaded.tokenizer  # the folder has nothing else
    inputs = {"input_ids": torch.tensor([[5, *[319] * 5, 6, 7]]), "pixel_values": torch.rand(1, 3, 8, 8)}
    with torch.no_grad():
        assert torch.equal(loaded.model(**inputs).logits, model(**inputs).logits)


def test_weights_of_the_vision_tower_are_not_made_up(saved):
    model = tiny_llava()
    del model.model.vision_tower.encoder.layers[1]
    folder = saved(model)
    with pytest.raises(InputError, match=r"the weights are not those of the LlavaForConditionalGeneration .*it lacks"):
        load(folder)


@pytest.fixture
def images():
    return pytest.importorskip("PIL.Image", reason="images need pillow")


def with_processor(folder, tokenizer):
    from transformers import CLIPImageProcessor

    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    image_token = {"image_token": tokenizer.convert_ids_to_tokens(319)}
    LlavaProcessor(
        CLIPImageProcessor(**sizes),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=1,
        **image_token,
    ).save_pretrained(folder)


@pytest.mark.skipif(is_vision_available(), reason="pillow is here")
def test_without_pillow_it_takes_text(saved):
    folder = saved(tiny_llava())
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    with pytest.warns(UserWarning, match="gets text only, as pillow is missing"):
        loaded = load(folder)
    assert loaded.kind == "vision_language" and loaded.processor is loaded.tokenizer


def test_the_processor_comes_with_its_tokenizer(images, saved, tokenizer):
    folder = saved(tiny_llava())
    with_processor(folder, tokenizer)
    model, read = loaded = load(folder)
    assert isinstance(loaded.processor, LlavaProcessor) and loaded.processor.tokenizer is read
    assert read.padding_side == "left" and read.get_vocab() == tokenizer.get_vocab()
    image = tokenizer.convert_ids_to_tokens(319)
    inputs = loaded.processor(images=images.new("RGB", (8, 8), "red"), text=f"the sea {image}", return_tensors="pt")
    assert (inputs.input_ids == 319).sum() == 5
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs.input_ids.shape[1] + 2


# --- beside another model ------------------------------------------------------------------------------------------


def test_a_model_beside_another_is_loaded_once_and_goes_with_it(saved):
    folder, target = saved(tiny_llama(1)), tiny_llama(0)
    first, second = shared(folder, like=target), shared(str(folder), like=target)
    assert first is second and isinstance(first, Loaded)
    assert shared(folder, like=tiny_llama(2)) is not first
    gone = weakref.ref(first.model)
    del first, second
    gc.collect()
    assert gone() is not None  # the target is still there
    del target
    gc.collect()
    assert gone() is None


def test_it_has_the_dtype_of_the_other_and_only_the_newest_stay(saved, tmp_path):
    folder, target = saved(tiny_llama(1)), tiny_llama(0)
    oldest = weakref.ref(shared(folder, like=target).model)
    for dtype in (torch.bfloat16, torch.float16):
        assert shared(folder, like=target.to(dtype)).model.dtype == dtype
    gc.collect()
    assert oldest() is None
