"""SkipDecode: schedules, skipping in the loop and in plain generate, the parallel form, training for it."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.families import own_hooks
from transformers import GPTJConfig, GPTJForCausalLM

from tokenry import InputError
from tokenry.decode import SkipDecode, SkipSchedule, TransformersEngine, loop, skip_forward
from tokenry.decode.skipdecode import SkipPolicy
from tokenry.hooks.layers import mask_layers, skip_layers
from tokenry.models.anatomy import decoder_layers
from tokenry.models.kv_cache import layer_lengths

PROMPTS = ["the old lighthouse", "Elara walked along the shore and", "the"]
OPTIONS = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 1}


def encode(tokenizer, prompts=PROMPTS):
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@pytest.fixture(scope="module")
def gptj():
    """A model whose blocks return tuples, as those of OPT once did."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=320, n_embd=32, n_layer=4, n_head=4, n_positions=128, rotary_dim=8, n_inner=64)
    model = GPTJForCausalLM(GPTJConfig(**sizes, pad_token_id=1, eos_token_id=0, bos_token_id=None))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.dim() > 1 else None
    return model.eval()


class Fixed:
    """A schedule as the policy of an engine, as it is."""

    def __init__(self, schedule):
        self.schedule = schedule

    def begin(self, prompt_columns, new_columns):
        assert prompt_columns == self.schedule.prompt_len

    def layers(self, column):
        return self.schedule.layers(column)


@st.composite
def schedules(draw, layers=4, prompt=6):
    """Any schedule for a model of so many layers."""
    warmup = draw(st.integers(1, layers - 1))
    e_max = draw(st.integers(warmup + 1, layers))
    new = draw(st.integers(1, 15))
    common = dict(warmup=warmup, prompt_len=prompt, planned_new_tokens=new)
    if draw(st.booleans()):
        depths = draw(st.lists(st.integers(warmup + 1, e_max), min_size=1, max_size=new))
        return SkipSchedule(layers, e_max, **common, kind="custom", depths=sorted(depths, reverse=True))
    e_min = draw(st.integers(warmup + 1, e_max))
    kind = draw(st.sampled_from(["linear", "constant", "power"]))
    return SkipSchedule(layers, e_max, e_min, **common, kind=kind, power=draw(st.floats(0.2, 4)))


# --- schedules -------------------------------------------------------------------------------------------------


def test_the_table_of_a_linear_schedule_is_rounded_half_up():
    schedule = SkipSchedule(8, 8, 3, warmup=1, prompt_len=8, planned_new_tokens=12)
    assert [schedule.depth(t) for t in range(7, 21)] == [8, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 3]
    halves = SkipSchedule(8, 8, 3, warmup=1, prompt_len=1, planned_new_tokens=11)
    assert [halves.depth(t) for t in range(1, 12)] == [8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3]  # 7.5 is 8, 6.5 is 7, ...
    assert sorted(schedule.layers(8)) == list(range(8)) and sorted(schedule.layers(19)) == [0, 6, 7]
    last = [max(t for t in range(20) if layer in schedule.layers(t)) + 1 for layer in range(8)]
    assert last == [20, 10, 12, 14, 16, 18, 20, 20]


def test_other_schedules():
    common = dict(warmup=1, prompt_len=5, planned_new_tokens=5)
    constant = SkipSchedule(8, 7, 4, kind="constant", **common)
    assert [constant.depth(t) for t in range(3, 9)] == [7, 7, 4, 4, 4, 4]
    square = SkipSchedule(8, 8, 4, kind="power", power=2.0, **common)
    assert [square.depth(t) for t in range(5, 11)] == [8, 8, 7, 6, 4, 4]  # 8, 7.75, 7, 5.75, 4
    custom = SkipSchedule(8, 8, kind="custom", depths=[8, 5, 5, 3], **common)
    assert [custom.depth(t) for t in range(4, 12)] == [8, 8, 5, 5, 3, 3, 3, 3] and custom.e_min == 3
    assert SkipSchedule(30).e_min == 15 and SkipSchedule(3).e_min == 3 and SkipSchedule(7).e_min == 4
    assert SkipSchedule(8, 3, warmup=1).e_min == 3  # half of the layers, but no more than e_max
    assert SkipSchedule(8, 8, 3, planned_new_tokens=1).depth(1) == 8


@settings(max_examples=200, deadline=None)
@given(layers=st.integers(2, 40), data=st.data())
def test_depth_never_grows_and_sets_are_nested(layers, data):
    schedule = data.draw(schedules(layers, data.draw(st.integers(1, 9))))
    columns = range(schedule.end + 4)
    depths, sets = [schedule.depth(t) for t in columns], [schedule.layers(t) for t in columns]
    assert depths == sorted(depths, reverse=True)
    assert all(after <= before for before, after in pairwise(sets))
    assert all(len(s) == d and set(range(schedule.warmup)) <= s for s, d in zip(sets, depths))
    assert all(d == schedule.e_max for d in depths[: schedule.prompt_len])
    assert schedule.warmup < schedule.e_min <= depths[-1] or schedule.planned_new_tokens == 1
    mask = schedule.mask(len(columns))
    assert mask.shape == (layers, len(columns))
    assert all(set(mask[:, t].nonzero()[:, 0].tolist()) == sets[t] for t in columns)
    new = depths[schedule.prompt_len : schedule.end]
    assert schedule.speedup() == pytest.approx(layers / (sum(new) / len(new)))


def test_linear_speedup_is_the_mean_of_both_ends():
    schedule = SkipSchedule(30, 28, 12, planned_new_tokens=500)
    assert schedule.speedup() == pytest.approx(30 / 20, rel=0.01)


@settings(max_examples=60, deadline=None)
@given(
    target=st.floats(1, 6), layers=st.integers(6, 40), kind=st.sampled_from(["linear", "constant", "power"]),
    new=st.integers(1, 60),
)  # fmt: skip
def test_a_target_lowers_e_min_first_and_then_e_max(target, layers, kind, new):
    common = dict(warmup=1, planned_new_tokens=new, kind=kind)
    if target > layers / 2:
        with pytest.raises(InputError, match=f"up to {layers / 2:.2f}"):
            SkipSchedule.for_speedup(target, layers, **common)
        return
    found = SkipSchedule.for_speedup(target, layers, **common)
    assert found.speedup() >= target
    if found.e_min < found.e_max and found.e_min > 2:  # one layer more would not do
        assert found.e_max == layers and replace(found, e_min=found.e_min + 1).speedup() < target
    if found.e_max < layers:  # only after e_min has reached the least
        assert found.e_min == 2 and replace(found, e_max=found.e_max + 1).speedup() < target


# --- equal to plain, equal to the parallel form -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "opt"])
@pytest.mark.parametrize("rows", [1, 3])
def test_at_full_depth_nothing_changes(make_model, tokenizer, kind, rows):
    model, inputs = make_model(kind), encode(tokenizer, PROMPTS[:rows])
    plain = model.generate(**inputs, **OPTIONS)
    full = SkipDecode(e_min=4, planned_new_tokens=20)
    with full(model):
        assert torch.equal(plain, model.generate(**inputs, **OPTIONS))
    looped = model.generate(**inputs, custom_generate=loop, layer_policy=SkipPolicy(full, model), **OPTIONS)
    assert torch.equal(plain, looped) and own_hooks(model) == []
    ids = inputs["input_ids"][:1]
    full_mask = torch.ones(4, ids.shape[1], dtype=torch.bool)
    assert torch.equal(skip_forward(model, ids, full_mask).logits, model(ids, use_cache=False).logits)


def decode_by_hand(model, schedule, prompt, mask, tokens):
    """Logits (batch, new + 1, vocab) of cached decoding, and the engine."""
    engine = TransformersEngine(model, layer_policy=Fixed(schedule))
    found = [engine.forward(prompt, mask)]
    found += [engine.forward(tokens[:, i : i + 1]) for i in range(tokens.shape[1])]
    return torch.stack(found, 1), engine


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=schedules(), kind=st.sampled_from(["llama", "qwen2", "opt", "gptj"]), seed=st.integers(0, 99))
@torch.no_grad()
def test_cached_decoding_equals_the_parallel_form(make_model, gptj, schedule, kind, seed):
    """Grouped queries, learned positions, blocks that return tuples; two of three rows padded on the left."""
    model = gptj if kind == "gptj" else make_model(kind)
    ids = torch.randint(2, 320, (3, 20), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[2, :4] = 0
    got, engine = decode_by_hand(model, schedule, ids[:, :6], mask[:, :6], ids[:, 6:])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    extra = {"attention_mask": mask, "position_ids": positions}
    expected = skip_forward(model, ids, schedule.mask(20), **extra).logits[:, 5:]
    assert (got - expected).abs().max() < 1e-4
    lengths = [max(t for t in range(20) if layer in schedule.layers(t)) + 1 if schedule.mask(20)[layer].any() else 0
               for layer in range(4)]  # fmt: skip
    assert layer_lengths(engine.cache) == lengths


@torch.no_grad()
def test_windows_are_kept_when_each_kind_of_attention_runs(make_model):
    model = make_model("gemma3")
    ids = torch.randint(2, 320, (2, 40), generator=torch.Generator().manual_seed(3))
    schedule = SkipSchedule(4, 4, 3, warmup=2, prompt_len=20, planned_new_tokens=20)
    got, _ = decode_by_hand(model, schedule, ids[:, :20], None, ids[:, 20:])
    assert (got - skip_forward(model, ids, schedule.mask(40)).logits[:, 19:]).abs().max() < 1e-4


def test_lengths_of_the_cache_in_plain_generate(llama, tokenizer):
    """Layer l holds the columns up to the last one that ran it."""
    inputs = encode(tokenizer)
    width = inputs["input_ids"].shape[1]
    method = SkipDecode(e_min=2, warmup=1, planned_new_tokens=20)
    with method(llama):
        out = llama.generate(**inputs, **OPTIONS, eos_token_id=None, return_dict_in_generate=True)
    schedule = method.schedule_for(4, width, 20)
    fed = schedule.mask(width + 19)  # the last token is not fed
    assert layer_lengths(out.past_key_values) == fed.sum(1).tolist()
    assert len(set(layer_lengths(out.past_key_values))) == 3


@pytest.mark.parametrize("kind", ["llama", "opt", "gptj"])
def test_plain_generate_equals_the_loop(make_model, gptj, tokenizer, kind):
    model, inputs = gptj if kind == "gptj" else make_model(kind), encode(tokenizer)
    method = SkipDecode(e_min=2, e_max=3, warmup=1, planned_new_tokens=20)
    with method(model):
        plain = model.generate(**inputs, **OPTIONS)
        assert torch.equal(plain, model.generate(**inputs, **OPTIONS))  # used twice
    looped = model.generate(**inputs, custom_generate=loop, layer_policy=SkipPolicy(method, model), **OPTIONS)
    assert torch.equal(plain, looped)
    assert not torch.equal(plain, model.generate(**inputs, **OPTIONS))


@torch.no_grad()
def test_rewinding_and_decoding_again_is_exact(llama):
    """Also over the columns where layers end; the cache is cut by columns, not by a count for every layer."""
    ids = torch.randint(2, 320, (1, 24), generator=torch.Generator().manual_seed(1))
    schedule = SkipSchedule(4, 4, 2, warmup=1, prompt_len=6, planned_new_tokens=16)
    _, engine = decode_by_hand(llama, schedule, ids[:, :6], None, ids[:, 6:22])
    for back in (1, 9, 15):
        engine.rollback(0, back)
        kept = engine.columns
        assert layer_lengths(engine.cache) == [min(kept, int(n)) for n in schedule.mask(kept).sum(1)]
        for i in range(kept, 22):
            logits = engine.forward(ids[:, i : i + 1] + 1)
        changed = torch.cat([ids[:, :kept], ids[:, kept:22] + 1], 1)
        expected = skip_forward(llama, changed, schedule.mask(22)).logits[:, -1]
        assert (logits - expected).abs().max() < 1e-4
        ids = torch.cat([changed, ids[:, 22:]], 1)


@torch.no_grad()
def test_in_a_batch_the_depth_follows_the_column(llama):
    """A row that goes back leaves a dead column; the others go on as deep as their column."""
    ids = torch.randint(2, 320, (2, 18), generator=torch.Generator().manual_seed(2))
    schedule = SkipSchedule(4, 4, 2, warmup=1, prompt_len=6, planned_new_tokens=10)
    _, engine = decode_by_hand(llama, schedule, ids[:, :6], None, ids[:, 6:12])
    engine.rollback(0, 3)
    for i in range(12, 18):
        logits = engine.forward(ids[:, i : i + 1])
    mask = torch.ones_like(ids)
    mask[0, 9:12] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = skip_forward(llama, ids, schedule.mask(18), attention_mask=mask, position_ids=positions)
    assert (logits - out.logits[:, -1]).abs().max() < 1e-4


def test_layers_that_run_are_those_of_the_schedule(llama, tokenizer):
    """The cost is known in advance: block calls, counted."""
    inputs, ran = encode(tokenizer), []
    width = inputs["input_ids"].shape[1]
    method = SkipDecode(target_speedup=1.5, warmup=1)
    hooks = [
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(decoder_layers(llama))
    ]
    try:
        options = {**OPTIONS, "max_new_tokens": 60, "eos_token_id": None}
        llama.generate(**inputs, custom_generate=loop, layer_policy=SkipPolicy(method, llama), **options)
    finally:
        for hook in hooks:
            hook.remove()
    schedule = method.schedule_for(4, width, 60)
    fed = [width - 1, *range(width, width + 59)]
    assert len(ran) == sum(schedule.depth(t) for t in fed)
    assert (len(ran) - schedule.e_max) / 59 == pytest.approx((schedule.e_max + schedule.e_min) / 2, abs=0.1)
    assert (len(ran) - schedule.e_max) / 59 / 4 == pytest.approx(1 / schedule.speedup(), rel=0.03)


def test_skipped_blocks_answer_like_blocks(llama, gptj):
    from tokenry.hooks.layers import LayerSwitch

    for model in (llama, gptj):
        switch, blocks = LayerSwitch(model), list(decoder_layers(model))
        with torch.no_grad():
            with switch.only(frozenset({0, 3})):
                once = model(torch.arange(2, 12)[None]).logits
                assert len(decoder_layers(model)) == 4
            with switch.only(frozenset({0, 3})), switch.only(frozenset({0, 3})):
                assert torch.equal(once, model(torch.arange(2, 12)[None]).logits)
            mask = torch.zeros(4, 10, dtype=torch.bool)
            mask[[0, 3]] = True
            assert torch.allclose(once, skip_forward(model, torch.arange(2, 12)[None], mask).logits, atol=1e-5)
        assert list(decoder_layers(model)) == blocks and own_hooks(model) == []


def test_an_error_inside_leaves_nothing_behind(llama, tokenizer):
    blocks = list(decoder_layers(llama))
    ids = encode(tokenizer, PROMPTS[:1])["input_ids"]

    def fail(*_):
        raise RuntimeError("stop")

    broken = blocks[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"), SkipDecode(e_max=3, planned_new_tokens=5)(llama):
        try:
            llama(ids)
        finally:
            broken.remove()
            assert list(decoder_layers(llama)) == blocks  # right after the forward, not only at the end
    with pytest.raises(InputError, match="3 columns, the text"):
        skip_forward(llama, ids, SkipSchedule(4, 3).mask(3))
    assert list(decoder_layers(llama)) == blocks and own_hooks(llama) == []


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup": 0}, "layer 0 must run: the length of the cache is read from it"),
        ({"warmup": 8}, "warmup=8 is not allowed for 8 layers; give 1 to 7"),
        ({"e_min": 2}, r"e_min=2 is not allowed; give 3 \(warmup \+ 1\) to e_max=8"),
        ({"e_max": 6, "e_min": 7}, r"e_min=7 is not allowed; give 3 .* to e_max=6"),
        ({"e_max": 9}, r"e_max=9 is not allowed; give 3 .* to 8"),
        ({"e_max": 2}, "e_max=2 is not allowed"),
        ({"kind": "steps"}, "schedule 'steps' is unknown; use one of linear"),
        ({"power": 0.0}, "power=0.0"),
        ({"planned_new_tokens": 0}, "planned_new_tokens=0"),
        ({"prompt_len": 0}, "prompt_len=0"),
        ({"kind": "custom"}, "has no depths"),
        ({"kind": "custom", "depths": [8, 6, 7, 5]}, "grows from 6 to 7 at new token 2"),
        ({"kind": "custom", "depths": [8, 2]}, "depth 2 at new token 1 is not allowed; give 3 to 8"),
        ({"kind": "custom", "depths": [9]}, "depth 9 at new token 0"),
    ],
)
def test_a_schedule_refuses(values, message):
    with pytest.raises(InputError, match=message):
        SkipSchedule(8, **values)


@pytest.mark.parametrize("target", [0.5, float("nan"), float("inf")])
def test_a_target_below_one_is_refused(target):
    with pytest.raises(InputError, match=r"target_speedup=.* give a number >= 1"):
        SkipSchedule.for_speedup(target, 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"warmup": 0}, r"warmup=0 .*in \[1, "),
        ({"e_min": 1}, r"e_min=1 .*in \[2, "),
        ({"power": -1}, "power=-1"),
        ({"planned_new_tokens": 0}, "planned_new_tokens=0"),
        ({"target_speedup": 0.9}, r"target_speedup=0.9 .*in \[1, "),
        ({"target_speedup": 2, "e_min": 3}, "e_min and target_speedup both decide"),
        ({"depths": [4, 3], "e_min": 3}, "e_min and depths both decide"),
        ({"schedule": "steps"}, "schedule='steps'"),
    ],
)
def test_the_method_refuses(values, message):
    with pytest.raises(InputError, match=message):
        SkipDecode(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"e_min": 2}, r"e_min=2 is not allowed; give 3 .* to e_max=4"),
        ({"e_max": 5}, "e_max=5 is not allowed; give 3 .* to 4"),
        ({"warmup": 4}, "warmup=4 is not allowed for 4 layers"),
        ({"target_speedup": 1.5}, "give a number up to 1.33"),
        ({"depths": "3,4"}, "grows from 3 to 4 at new token 1"),
    ],
)
def test_what_a_model_has_not_is_refused(llama, tokenizer, values, message):
    with pytest.raises(InputError, match=message):
        SkipDecode(**values).plugins(llama, tokenizer)


def test_models_that_cannot_skip_are_refused(make_model, llama, monkeypatch):
    with pytest.raises(InputError, match=r"sized from layer 1, .* warmup=2 or more"):
        SkipPolicy(SkipDecode(warmup=1), make_model("gemma3"))
    monkeypatch.setattr(llama.config, "num_kv_shared_layers", 2, raising=False)
    with pytest.raises(InputError, match="2 layers of LlamaForCausalLM share keys and values"):
        SkipPolicy(SkipDecode(), llama)
    monkeypatch.setattr(llama.config, "num_kv_shared_layers", 0, raising=False)
    monkeypatch.setattr(llama.config, "is_encoder_decoder", True)
    with pytest.raises(InputError, match="has an encoder"), SkipDecode(planned_new_tokens=4)(llama):
        pass


def test_beyond_the_plan_the_smallest_depth_stays_and_a_warning_says_so(llama, tokenizer):
    inputs, method = encode(tokenizer), SkipDecode(e_min=3, planned_new_tokens=6)
    with pytest.warns(UserWarning, match="20 new tokens go beyond planned_new_tokens=6"):
        looped = llama.generate(**inputs, custom_generate=loop, layer_policy=SkipPolicy(method, llama), **OPTIONS)
    with method(llama), pytest.warns(UserWarning, match="7 new tokens go beyond planned_new_tokens=6") as seen:
        plain = llama.generate(**inputs, **OPTIONS)
    assert torch.equal(plain, looped) and len(seen) == 1


def test_plain_generate_refuses_what_it_cannot_follow(llama, tokenizer):
    inputs = encode(tokenizer)
    with pytest.raises(InputError, match="give planned_new_tokens=N"), SkipDecode()(llama):
        pass
    method = SkipDecode(e_min=3, planned_new_tokens=20)
    with pytest.raises(InputError, match="leave use_cache on"), method(llama):
        llama.generate(**inputs, **OPTIONS, use_cache=False)
    with pytest.raises(InputError, match="assisted decoding"), method(llama):
        llama.generate(**encode(tokenizer, PROMPTS[:1]), **OPTIONS, prompt_lookup_num_tokens=3)
    with pytest.raises(InputError, match="padded on the right"), method(llama):
        llama.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"].flip(1), **OPTIONS)
    assert own_hooks(llama) == []


def test_the_loop_refuses_what_it_cannot_skip(llama, tokenizer):
    inputs, policy = encode(tokenizer), SkipPolicy(SkipDecode(e_min=3), llama)
    options = {**OPTIONS, "custom_generate": loop, "layer_policy": policy}
    with pytest.raises(InputError, match="padded on the right"):
        llama.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"].flip(1), **options)
    with pytest.raises(InputError, match="cannot be fed again"):
        from tokenry.decode import PhraseBan

        llama.generate(**inputs, **options, monitors=[PhraseBan(["x"])], processing_class=tokenizer, rewind="reprefill")
    with pytest.raises(InputError, match="nobody says how many tokens"):
        TransformersEngine(llama, layer_policy=policy).forward(**{"tokens": inputs["input_ids"]})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 6), "boolean one of"),
        (torch.ones(3, 6, dtype=torch.bool), "4 layers"),
        (torch.ones(4, dtype=torch.bool), "4 layers"),
        (torch.arange(4)[:, None].expand(4, 6) > 0, "layer 0, which always runs"),
        (torch.tensor([[1] * 6, [1, 0, 1, 1, 0, 0], [1] * 6, [1] * 6]).bool(), "layer 1 runs again at column 2"),
    ],
)
def test_a_mask_that_no_cache_could_follow_is_refused(llama, mask, message):
    with pytest.raises(InputError, match=message):
        skip_forward(llama, torch.arange(2, 8)[None], mask)


# --- training ----------------------------------------------------------------------------------------------------


def trainer_for(model, tokenizer, folder, rows=None, **options):
    from datasets import Dataset

    from tokenry.train import SkipDecodeConfig, SkipDecodeTrainer

    torch.manual_seed(0)
    config = SkipDecodeConfig(
        output_dir=str(folder), report_to="none", bf16=False, use_cpu=True, disable_tqdm=True, save_strategy="no",
        **{"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, **options},
    )  # fmt: skip
    return SkipDecodeTrainer(model, config, train_dataset=Dataset.from_list(rows or ROWS), processing_class=tokenizer)


ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 10, 11, 12], "labels": [-100] * 3 + [8, 9, 10, 11, 12]},
    {"input_ids": [15, 16, 17, 18], "labels": [-100, 16, 17, 18]},
]


def batch_of(trainer):
    return trainer._prepare_inputs(trainer.data_collator(ROWS))


def twin(model):
    import copy

    return copy.deepcopy(model)


@torch.no_grad()
def test_at_full_depth_the_loss_is_the_parents(llama, tokenizer, tmp_path):
    from trl import SFTTrainer

    trainer = trainer_for(twin(llama), tokenizer, tmp_path, e_min=4)
    expected = SFTTrainer.compute_loss(trainer, trainer.model, batch_of(trainer))
    assert torch.equal(trainer.compute_loss(trainer.model, batch_of(trainer)), expected)
    trainer.schedule = SkipSchedule(4, 4, 3, planned_new_tokens=4)
    assert not torch.equal(trainer.compute_loss(trainer.model, batch_of(trainer)), expected)


def test_the_loss_is_that_of_the_tokens_as_they_will_be_decoded(llama, tokenizer, tmp_path):
    """Against every row alone, unpadded, decoded token by token with a cache."""
    trainer = trainer_for(twin(llama), tokenizer, tmp_path, e_min=2, e_max=3, warmup=1, planned_new_tokens=4)
    nats = []
    for row in ROWS:
        ids, first = torch.tensor([row["input_ids"]]), row["labels"].count(-100)
        schedule = replace(trainer.schedule, prompt_len=first)
        with torch.no_grad():
            logits, _ = decode_by_hand(trainer.model.eval(), schedule, ids[:, :first], None, ids[:, first:-1])
        nats.append(-logits[0].log_softmax(-1).gather(1, ids[0, first:, None])[:, 0])
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    assert float(loss) == pytest.approx(float(torch.cat(nats).mean()), rel=1e-4)


def test_a_text_without_a_prompt_begins_at_once(llama, tokenizer, tmp_path):
    trainer = trainer_for(twin(llama), tokenizer, tmp_path, e_min=2, warmup=1, planned_new_tokens=3)
    labels = torch.tensor([[5, 6, 7, 8], [-100, -100, -100, -100], [-100, 6, 7, -100]])
    assert trainer.executed(labels).sum(0).tolist() == [[4, 3, 2, 2], [4, 4, 4, 4], [4, 4, 3, 2]]


def test_training_lowers_the_loss_at_the_depth_trained_for(llama, tokenizer, tmp_path):
    trainer = trainer_for(twin(llama), tokenizer, tmp_path, e_min=2, warmup=1, planned_new_tokens=4, max_steps=12)
    with torch.no_grad():
        before = trainer.compute_loss(trainer.model.eval(), batch_of(trainer))
    trainer.train()
    with torch.no_grad():
        after = trainer.compute_loss(trainer.model.eval(), batch_of(trainer))
    assert after < before - 0.5 and own_hooks(trainer.model) == []


@torch.no_grad()
def test_a_layer_that_no_column_runs_takes_no_time(llama):
    mask, ids, ran = SkipSchedule(4, 3, 2, 1, 2, 4).mask(6), torch.arange(2, 8)[None], []
    handles = [
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(decoder_layers(llama))
    ]
    with mask_layers(llama, mask):
        masked = llama(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    assert ran == [0, 2, 3] == mask.any(1).nonzero().flatten().tolist()
    with skip_layers(llama, {0, 2, 3}):
        assert torch.equal(masked[:, 0], llama(ids, use_cache=False).logits[:, 0])


def test_one_smallest_depth_is_drawn_for_every_step(llama, tokenizer, tmp_path):
    options = dict(e_min=2, warmup=1, planned_new_tokens=4, sample_e_min=True)
    trainer = trainer_for(twin(llama), tokenizer, tmp_path, **options)
    trainer.model.train()
    drawn = []
    for trainer.state.global_step in range(60):
        assert trainer.step_schedule().e_min == trainer.step_schedule().e_min  # whatever is accumulated
        drawn.append(trainer.step_schedule().e_min)
    assert set(drawn) == {2, 3, 4} and min(map(drawn.count, (2, 3, 4))) > 8
    trainer.model.eval()
    assert trainer.step_schedule() is trainer.schedule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, "packing puts several texts into a row"),
        ({"padding_free": True}, "packing puts several texts into a row"),
        ({"e_min": 2}, "e_min=2 is not allowed; give 3"),
        ({"warmup": 0}, "warmup=0"),
        ({"schedule": "steps"}, "schedule 'steps' is unknown"),
        ({"planned_new_tokens": 0}, "planned_new_tokens=0"),
    ],
)
def test_the_trainer_refuses(llama, tokenizer, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        trainer_for(twin(llama), tokenizer, tmp_path, **options)


def test_layerdrop_and_router_losses_are_refused(make_model, tokenizer, tmp_path):
    model = twin(make_model("opt"))
    model.config.layerdrop = 0.1
    with pytest.raises(InputError, match=r"layerdrop=0\.1"):
        trainer_for(model, tokenizer, tmp_path)
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, output_router_logits=True, pad_token_id=1,
    )  # fmt: skip
    with pytest.raises(InputError, match="auxiliary loss"):
        trainer_for(MixtralForCausalLM(config), tokenizer, tmp_path)


# --- the experiment ----------------------------------------------------------------------------------------------


def test_layers_of_the_controls():
    from tokenry.measure.tasks.depth import EarlyExit, RandomLayers, depths

    early = EarlyExit(6, 6, 3, prompt_len=1, planned_new_tokens=9)
    assert (
        sorted(early.layers(9)) == [0, 1, 2] and early.mask(10).sum() == SkipSchedule(6, 6, 3, 2, 1, 9).mask(10).sum()
    )
    drawn = [RandomLayers(30, 30, 15, 4, 1, 9, draw=draw) for draw in (1, 2)]
    assert drawn[0].needs != drawn[1].needs
    for schedule in drawn:
        sets = [schedule.layers(t) for t in range(12)]
        assert all(after <= before for before, after in pairwise(sets))
        assert [len(s) for s in sets] == [schedule.depth(t) for t in range(12)] and {0, 1, 2, 3} <= sets[-1]
        skipped = sorted(set(range(30)) - sets[-1])
        assert skipped != list(range(skipped[0], skipped[-1] + 1))
    assert [depths(30, d) for d in (97, 90, 83, 75, 67)] == [(30, low) for low in (28, 24, 20, 15, 10)]
    assert [depths(12, d, 1) for d in (75, 50)] == [(10, 8), (7, 5)]


@pytest.fixture
def reasoner(monkeypatch, tmp_path):
    """A random one in the place of the model of the zoo, and an empty cache folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tokenry.evidence import skipdecode
    from tokenry.models.load import Loaded
    from tokenry.zoo.reasoner import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=6, num_attention_heads=2)
    config = LlamaConfig(vocab_size=len(tokenizer), **sizes, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    loaded, load = Loaded(LlamaForCausalLM(config).eval(), tokenizer), skipdecode.load
    monkeypatch.setenv("TOKENRY_CACHE", str(tmp_path))
    monkeypatch.setattr(skipdecode, "load", lambda name, **k: loaded if name == "zoo/reasoner" else load(name, **k))
    return loaded


@torch.no_grad()
def test_a_stack_has_every_layer_twice(reasoner):
    from tokenry.evidence.skipdecode import stacked

    deep, ids = stacked(reasoner).model, torch.arange(2, 12)[None]
    for part in (range(6), range(6, 12)):
        with skip_layers(deep, part):
            assert torch.equal(deep(ids, use_cache=False).logits, reasoner.model(ids, use_cache=False).logits)


def test_the_experiment_from_training_to_findings(reasoner, tmp_path):
    from tokenry.evidence.skipdecode import METHOD, PLAIN, build
    from tokenry.measure.compare import compare

    experiment = build(*reasoner, samples=3, seeds=(0,), quick=True)
    comparison = compare(experiment)
    assert [s.role for s in experiment.arms] == ["plain", *["control"] * 3, *["method"] * 3]
    assert len(list((tmp_path / "skipdecode").glob("*/*/*"))) == 5 + 5
    means = {s: comparison.mean(s, "nll_75") for s in comparison.arms}
    assert len(set(means.values())) == 7 and all(2 < m < 5 for m in means.values())
    assert comparison.mean(PLAIN, "nll_97") == comparison.mean(PLAIN, "nll_67")
    assert comparison.mean(PLAIN, "depth_50") == 1
    assert comparison.mean(METHOD, "depth_50") < 0.5 < comparison.mean(METHOD, "depth_75") < 0.75
    assert comparison.mean(METHOD, "trained_50") == 0 and comparison.mean(METHOD, "tokens") > 0
    findings = experiment.findings(comparison)
    assert len(findings) == 6 and all(f.numbers for f in findings) and not findings[0].holds
    assert f"average depth of {comparison.mean(METHOD, 'depth_50'):.0%}" in findings[1].statement
    with pytest.raises(InputError, match="sets e_min itself; give warmup alone"):
        build(*reasoner, method=SkipDecode(e_min=3, warmup=2))


# --- the command line --------------------------------------------------------------------------------------------


def test_the_command_line_decodes_and_warns(smollm2):
    from click.testing import CliRunner

    from tokenry.cli import main

    run = ["decode", "--method", "skipdecode", "-o", "e_min=24", "--max-new-tokens", "8", "--json", "Hello"]
    result = CliRunner().invoke(main, run)
    assert result.exit_code == 0 and '"forward_calls": 8' in result.stdout
    assert "writes worse text" in result.stderr
    refused = CliRunner().invoke(main, [*run[:4], "e_min=31", *run[5:]])
    assert refused.exit_code == 2 and "e_min=31 is not allowed; give 3 (warmup + 1) to e_max=30" in refused.stderr
