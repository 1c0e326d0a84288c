"""Every option of `model.generate`: the loop does what it says, or says that it does not. None is ignored."""

import inspect
import threading

import pytest
import torch
from support.families import build
from transformers import CompileConfig, GenerationConfig, GenerationMixin, StoppingCriteria, TextIteratorStreamer
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

import tokenry
from tokenry import InputError, decode
from tokenry.decode import PhraseBan, SpecReason, loop, speculative, tidar_generate
from tokenry.decode.generation.options import REFUSED
from tokenry.models.masks import make_bidirectional

PROMPTS = ["the old sea and the old sea and the old", "a whisper in the night"]
HONOURED = {  # {field: options that change what plain `generate` writes, and so what the loop must write}
    "max_length": {"max_length": 22},
    "max_new_tokens": {"max_new_tokens": 5},
    "min_length": {"min_length": 24, "eos_token_id": [213, 66]},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": [213, 66]},
    "do_sample": {"do_sample": True},
    "temperature": {"do_sample": True, "temperature": 0.6},
    "top_k": {"do_sample": True, "top_k": 3},
    "top_p": {"do_sample": True, "top_p": 0.6},
    "min_p": {"do_sample": True, "min_p": 0.2},
    "top_h": {"do_sample": True, "top_h": 0.4},
    "typical_p": {"do_sample": True, "typical_p": 0.5},
    "epsilon_cutoff": {"do_sample": True, "epsilon_cutoff": 0.02},
    "eta_cutoff": {"do_sample": True, "eta_cutoff": 0.02},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.7},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[213], [66]]},
    "renormalize_logits": {"renormalize_logits": True, "do_sample": True},
    "forced_bos_token_id": {"forced_bos_token_id": 9},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 292},
    "suppress_tokens": {"suppress_tokens": list(range(2, 200))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(100, 320))},
    "sequence_bias": {"sequence_bias": [[[213], -9.0]]},
    "guidance_scale": {"guidance_scale": 1.7},
    "watermarking_config": {"watermarking_config": {"bias": 2.5}},
    "num_return_sequences": {"num_return_sequences": 2, "do_sample": True},
    "eos_token_id": {"eos_token_id": 213},
    "pad_token_id": {"pad_token_id": 5, "eos_token_id": 213},
    "bos_token_id": {"bos_token_id": 3},
    "cache_implementation": {"cache_implementation": "static"},
    "max_cache_len": {"cache_implementation": "static", "max_cache_len": 64},
}
SILENT = {  # these show nothing on this model, prompt and seed; the comparison still holds
    "bos_token_id",
    "cache_implementation",
    "encoder_no_repeat_ngram_size",
    "eta_cutoff",
    "forced_bos_token_id",
    "max_cache_len",
    "min_p",
    "remove_invalid_values",
    "renormalize_logits",
}
BY_ITSELF = {"max_time", "stop_strings", "return_dict_in_generate", "cache_config"}  # tested on their own below
IDLE = {  # they do nothing in `generate` either, for a model without encoder that writes greedily or by sampling
    "early_stopping",
    "length_penalty",
    "decoder_start_token_id",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "max_matching_ngram_size",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
    "disable_compile",
}
IDLE_VALUES = {"num_assistant_tokens_schedule": "heuristic", "disable_compile": True, "early_stopping": True}
IDLE_VALUES |= {"assistant_ensemble_weight": 0.5}
BOOKKEEPING = {"_from_model_config", "transformers_version"}
ARGUMENTS = {"inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn"}
ARGUMENTS |= {"negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate", "kwargs", "self", "streamer"}
ASKED = {  # {refused option: a value that asks for something}
    "num_beams": 2,
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "constraints": ["x"],
    "force_words_ids": [[3]],
    "penalty_alpha": 0.6,
    "low_memory": True,
    "dola_layers": "low",
    "use_mtp": True,
    "speculation_type": "dflash",
    "prompt_lookup_num_tokens": 4,
    "assistant_early_exit": 2,
    "is_assistant": True,
    "output_scores": True,
    "output_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "use_cache": False,
    "prefill_chunk_size": 4,
    "token_healing": True,
    "compile_config": CompileConfig(),
    "continuous_batching_config": {"block_size": 4},
    "synced_gpus": True,
}


@pytest.fixture(scope="module")
def model():
    return build("llama")


@pytest.fixture
def inputs(tokenizer):
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def both(model, inputs, custom=loop, **options):
    """Ids of plain `generate` and of a custom one."""
    texts = []
    for own in ({}, {"custom_generate": custom}):
        torch.manual_seed(0)
        given = {"pad_token_id": 1, **({} if "max_length" in options else {"max_new_tokens": 10}), **options}
        texts.append(model.generate(**inputs, **own, **given).tolist())
    return texts


# --- the whole list -----------------------------------------------------------------------------------------------


def test_every_field_of_the_configuration_is_decided_on():
    """A field that a new version of transformers adds fails here until somebody decides what the loop does with it."""
    decided = [set(HONOURED), BY_ITSELF, IDLE, BOOKKEEPING, set(REFUSED) & set(vars(GenerationConfig()))]
    assert sorted(name for part in decided for name in part) == sorted(vars(GenerationConfig()))


def test_every_argument_of_generate_is_decided_on():
    assert set(inspect.signature(GenerationMixin.generate).parameters) - set(REFUSED) == ARGUMENTS
    assert set(ASKED) == set(REFUSED) - {"assistant_model", "assistant_tokenizer"}


@pytest.mark.parametrize("name", HONOURED)
def test_what_the_loop_honours_is_as_in_generate(model, inputs, name):
    plain, ours = both(model, inputs, **HONOURED[name])
    assert ours == plain
    if name not in SILENT:
        quiet = {key: value for key, value in HONOURED[name].items() if key != name}
        if name == "max_length":
            quiet["max_new_tokens"] = 10
        assert plain != both(model, inputs, **quiet)[0], "this value changes nothing, and so shows nothing"


@pytest.mark.parametrize("custom", [loop, speculative, tidar_generate])
@pytest.mark.parametrize("name", ASKED)
def test_what_the_loop_cannot_do_is_refused(model, inputs, name, custom):
    own = {"mask_token_id": 4} if custom is tidar_generate else {}
    with pytest.raises((InputError, ValueError)) as caught:
        model.generate(**inputs, custom_generate=custom, max_new_tokens=3, pad_token_id=1, **own, **{name: ASKED[name]})
    if name not in ("token_healing", "is_assistant"):  # transformers fails on these before it gets to the loop
        assert caught.type is InputError and name in str(caught.value)


@pytest.mark.parametrize("name", ASKED)
def test_the_same_by_the_other_door(model, tokenizer, name):
    with pytest.raises(InputError, match=name):
        tokenry.generate(model, tokenizer, PROMPTS, max_new_tokens=3, **{name: ASKED[name]})


@pytest.mark.parametrize("name", sorted(IDLE))
def test_what_means_nothing_to_generate_means_nothing_here(model, inputs, name):
    value = {
        "num_assistant_tokens_schedule": "heuristic",
        "disable_compile": True,
        "early_stopping": True,
        "assistant_ensemble_weight": 0.5,
    }.get(name, 3)
    plain, ours = both(model, inputs, **{name: value})
    assert ours == plain == both(model, inputs)[0]


def test_an_assistant_is_refused(model, inputs, tokenizer):
    with pytest.raises(InputError, match=r"assistant_model=LlamaForCausalLM is not possible here: .*drafter=model"):
        model.generate(**inputs, custom_generate=loop, assistant_model=build("llama"), max_new_tokens=3)
    with pytest.raises(InputError, match="assistant_model"):
        tokenry.generate(model, tokenizer, PROMPTS, assistant_model=build("llama"))


# --- those that need more than a comparison -----------------------------------------------------------------------


def test_time_runs_out(model, inputs):
    out = model.generate(**inputs, custom_generate=loop, max_new_tokens=300, max_time=1e-9, pad_token_id=1)
    assert out.shape[1] == inputs["input_ids"].shape[1] + 1


def test_stop_strings(model, inputs, tokenizer):
    """`generate` loses the tokenizer on the way; the other door and `stop` do what is meant."""
    plain = tokenry.generate(model, tokenizer, PROMPTS, max_new_tokens=20)
    word = plain.texts[0][4:6]
    by_stop = tokenry.generate(model, tokenizer, PROMPTS, max_new_tokens=20, stop=[word])
    assert len(by_stop.new_ids[0]) < 20 and by_stop.stop_reasons[0] == "finished"
    for given in (word, [word]):
        assert tokenry.generate(model, tokenizer, PROMPTS, max_new_tokens=20, stop_strings=given).texts == by_stop.texts
    config = GenerationConfig(stop_strings=[word])
    other = tokenry.generate(model, tokenizer, PROMPTS, max_new_tokens=20, generation_config=config)
    assert other.texts == by_stop.texts
    with pytest.raises(ValueError, match="could not locate a tokenizer"):
        model.generate(**inputs, custom_generate=loop, stop_strings=[word], tokenizer=tokenizer)


def test_stop_strings_of_the_model_itself(tokenizer):
    model = build("llama")
    plain = tokenry.generate(model, tokenizer, PROMPTS[0], max_new_tokens=20)
    model.generation_config.stop_strings = [plain.texts[0][4:6]]
    assert len(tokenry.generate(model, tokenizer, PROMPTS[0], max_new_tokens=20).new_ids[0]) < 20


def test_criteria_of_the_user(model, inputs):
    class Fifth(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return bool(input_ids.shape[1] >= width + 5)  # a plain bool, as criteria once were

    width = inputs["input_ids"].shape[1]
    assert both(model, inputs, stopping_criteria=[Fifth()])[1][0][width + 5 :] == []
    plain, ours = both(model, inputs, stopping_criteria=[MaxLengthCriteria(width + 3)])
    assert ours == plain and len(ours[0]) == width + 3


def test_a_configuration_says_whether_to_sample(model, tokenizer):
    config = GenerationConfig(do_sample=True, temperature=1.5)
    drawn = {
        tuple(
            tokenry.generate(model, tokenizer, PROMPTS[0], max_new_tokens=8, generation_config=config, seed=s).new_ids[
                0
            ]
        )
        for s in range(3)
    }
    assert len(drawn) == 3
    with pytest.raises(InputError, match="give max_new_tokens beside it"):
        tokenry.generate(model, tokenizer, PROMPTS[0], generation_config=GenerationConfig(max_new_tokens=4))


@pytest.mark.parametrize(
    "options",
    [
        {"max_length": 20},
        {"input_ids": torch.ones(1, 2)},
        {"inputs_embeds": torch.ones(1, 2, 32)},
        {"attention_mask": torch.ones(1, 2)},
        {"custom_generate": loop},
        {"return_dict_in_generate": False},
        {"cache_implementation": "paged"},
    ],
)
def test_what_has_another_place_is_refused(model, tokenizer, options):
    with pytest.raises(InputError, match=next(iter(options))):
        tokenry.generate(model, tokenizer, PROMPTS[0], max_new_tokens=2, **options)


def test_processors_of_the_user(model, tokenizer):
    class Only(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.new_full(scores.shape, -torch.inf).index_fill(1, torch.tensor([7]), 0.0)

    out = tokenry.generate(model, tokenizer, PROMPTS, max_new_tokens=4, logits_processor=[Only()])
    assert out.new_ids == [[7] * 4] * 2


def test_what_counts_its_calls_does_not_go_with_rewinds(model, inputs, tokenizer):
    for options in ({"guidance_scale": 1.5}, {"watermarking_config": synth_id(), "do_sample": True}):
        plain, ours = both(model, inputs, **options)
        assert ours == plain
        with pytest.raises(InputError, match="counts the tokens it has seen"):
            model.generate(**inputs, custom_generate=speculative, max_new_tokens=4, **options)
        with pytest.raises(InputError, match="counts the tokens it has seen"):
            monitors = [PhraseBan(["sea"])]
            model.generate(**inputs, custom_generate=loop, monitors=monitors, processing_class=tokenizer, **options)


def synth_id():
    from transformers import SynthIDTextWatermarkingConfig

    return SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2, 3, 4, 5])


def test_positions_of_the_user(model, inputs):
    ids = inputs["input_ids"][:1]
    places = torch.arange(ids.shape[1])[None]
    plain = model.generate(ids, max_new_tokens=5)
    assert torch.equal(model.generate(ids, position_ids=places, custom_generate=loop, max_new_tokens=5), plain)
    with pytest.raises(InputError, match="position_ids do not count"):
        model.generate(ids, position_ids=places + 3, custom_generate=loop, max_new_tokens=5)


# --- streamers: whoever listens hears the end ---------------------------------------------------------------------


class Heard(BaseStreamer):
    def __init__(self):
        self.got, self.ends = [], 0

    def put(self, value):
        self.got += value.flatten().tolist()

    def end(self):
        self.ends += 1


def listen(streamer, write):
    """What a reader of the streamer hears while `write` runs in a thread, and what `write` raises."""
    caught = []

    def run():
        try:
            write()
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    text = "".join(streamer)
    thread.join()
    return text, caught


@pytest.mark.parametrize("custom", [loop, speculative])
def test_the_streamer_of_generate_is_fed(model, inputs, tokenizer, custom):
    one = {name: value[1:, -6:] for name, value in inputs.items()}
    streamer = TextIteratorStreamer(tokenizer, timeout=20, skip_prompt=True)
    text, caught = listen(streamer, lambda: model.generate(**one, custom_generate=custom, streamer=streamer))
    wanted = TextIteratorStreamer(tokenizer, timeout=20, skip_prompt=True)
    assert (text, caught) == (listen(wanted, lambda: model.generate(**one, streamer=wanted))[0], [])
    heard, plain = Heard(), Heard()
    model.generate(**one, custom_generate=custom, streamer=heard, max_new_tokens=7)
    model.generate(**one, streamer=plain, max_new_tokens=7)
    assert heard.got == plain.got and heard.ends == 1


def test_the_streamer_of_generate_by_the_other_door(model, tokenizer):
    streamer = TextIteratorStreamer(tokenizer, timeout=20, skip_prompt=True)
    out = []
    options = {"streamer": streamer, "max_new_tokens": 9}
    text, caught = listen(streamer, lambda: out.append(tokenry.generate(model, tokenizer, PROMPTS[0], **options)))
    assert (text, caught) == (out[0].texts[0], [])


class Breaks:
    """A monitor that fails after some tokens."""

    def check(self, row):
        if len(row.ids) > 2:
            raise RuntimeError("broken")

    def hold(self, row):
        return 0


FAILING = {
    "a monitor breaks": {"monitors": [Breaks()]},
    "refused by the loop": {"num_beams": 2},
    "refused by transformers": {"temperature": -1.0, "do_sample": True},
    "refused before": {"max_new_tokens": 0},
    "an unknown option": {"no_such_option": 1},
    "a method that cannot": {"methods": [decode.TiDAR(mask_token_id=9999)]},
    "a reading method": {"methods": [decode.DiffAdapt()]},
    "a diffusion method": {"methods": [decode.MaskedDiffusion()]},
    "two models": {"methods": [SpecReason(small="nowhere")]},
}


@pytest.mark.parametrize("name", FAILING)
def test_whoever_listens_hears_the_end_of_a_failure(model, tokenizer, name):
    streamer, heard = TextIteratorStreamer(tokenizer, timeout=20), Heard()
    options = {"max_new_tokens": 6, **FAILING[name]}
    _, caught = listen(
        streamer, lambda: tokenry.generate(model, tokenizer, PROMPTS[0], streamers=[streamer], **options)
    )
    assert len(caught) == 1 and not isinstance(caught[0], AssertionError)
    with pytest.raises(type(caught[0])):
        tokenry.generate(model, tokenizer, PROMPTS[0], streamers=[heard], **options)
    assert heard.ends == 1


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"monitors": [Breaks()]}, {"stop": [""]}])
def test_the_same_inside_generate(model, inputs, tokenizer, options):
    one = {name: value[1:, -6:] for name, value in inputs.items()}
    if "num_beams" in options:  # transformers itself refuses a streamer with beams, before it has put anything
        options = {"output_scores": True}
    for given in ("streamer", "token_streamers"):
        heard = Heard()
        with pytest.raises((InputError, RuntimeError)):
            model.generate(
                **one,
                custom_generate=loop,
                processing_class=tokenizer,
                **{given: [heard] if given == "token_streamers" else heard},
                **options,
            )
        assert heard.ends == 1


def test_one_streamer_for_several_rows_is_refused(model, inputs):
    heard = Heard()
    with pytest.raises(InputError, match="streamer shows one row, here are 2 rows"):
        model.generate(**inputs, custom_generate=loop, streamer=heard, max_new_tokens=2)
    assert heard.ends == 1


def test_a_streamer_needs_no_tokenizer(model, inputs):
    heard = [Heard(), Heard()]
    out = model.generate(**inputs, custom_generate=loop, token_streamers=heard, max_new_tokens=4, pad_token_id=1)
    assert [one.got for one in heard] == out.tolist()


# --- the other loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ASKED, "stop", "eos_token_id", "max_time", "repetition_penalty", "logits_processor"])
def test_masked_diffusion_refuses_what_it_has_no_use_for(tokenizer, name):
    model = make_bidirectional(build("llama"))
    model.config.mask_token_id = 4
    values = {**ASKED, "stop": ["x"], "eos_token_id": 0, "max_time": 1.0, "repetition_penalty": 1.2}
    values |= {"logits_processor": [object()], "use_cache": True}
    with pytest.raises(InputError):
        decode.MaskedDiffusion().generate(model, tokenizer, PROMPTS, max_new_tokens=32, **{name: values[name]})


STEPWISE = {**ASKED, "max_time": 1.0, "stop_strings": ["x"], "cache_implementation": "static"}
STEPWISE |= {"min_new_tokens": 3, "forced_eos_token_id": 3, "begin_suppress_tokens": [3], "guidance_scale": 1.5}
STEPWISE |= {"encoder_repetition_penalty": 1.2, "prefix_allowed_tokens_fn": lambda row, ids: [3], "streamer": Heard()}
STEPWISE |= {"exponential_decay_length_penalty": (3, 1.2), "stopping_criteria": [MaxLengthCriteria(3), Breaks()]}


@pytest.mark.parametrize("name", STEPWISE)
def test_step_by_step_refuses_what_counts_or_ends_texts(model, tokenizer, name):
    method = SpecReason(small=(model, tokenizer), prompts="lines")
    with pytest.raises((InputError, ValueError)) as caught:
        method.generate(model, tokenizer, "1+1=", max_new_tokens=4, chat=False, **{name: STEPWISE[name]})
    if name not in ("token_healing", "is_assistant"):
        assert caught.type is InputError
