"""Every context that changes a model: in any order, by one thread, and never on a compiled model."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import SIZES, build, own_hooks
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from tokenry import capture, load
from tokenry.core.errors import InputError
from tokenry.decode import MaskedDiffusionModel, SkipDecode, diffusion_generate, loop, speculative, tidar_generate
from tokenry.hooks.attention import edit_mask, observe, suppress
from tokenry.hooks.layers import mask_layers, skip_layers
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
from tokenry.models.anatomy import decoder_layers, fingerprint
from tokenry.models.masks import make_bidirectional
from tokenry.represent import TokenPrepending
from tokenry.select import CacheCutter, FirstLast

IDS = torch.randint(6, 320, (1, 20), generator=torch.Generator().manual_seed(0))
SLOT = 5
IDS[0, 3] = SLOT
NEXT = torch.tensor([[7]])
KEPT = torch.ones(4, 20, dtype=torch.bool)
KEPT[2, 10:] = False


@contextmanager
def captured(model, seen):
    with ExitStack() as stack:
        run = stack.enter_context(capture(model, hidden=[2], qk="all"))
        yield
        try:
            stack.close()
        except InputError as refusal:  # a layer was skipped for some of the tokens
            seen.append(str(refusal))
            return
    if run.traces:
        seen += [("ids", run.trace.tensors["ids"].tolist()), ("hidden", run.trace.hidden(2).tolist())]


def counted(model, seen):
    return observe(model, lambda call: seen.append((call.layer, call.key.shape[2])))


def masked(model, seen):
    return edit_mask(model, lambda call: seen.append(call.layer) or call.mask)


def kept(model, seen):
    return edit_residual(model, {1: lambda h: seen.append(("residual", h.shape[1])) or h})


@contextmanager
def caught(model, seen):
    with capture_residual(model, [2]) as found:
        yield
    seen += [("residual 2", part.shape[1]) for part in found[2][-1:]]


CONTEXTS = {
    "observe": counted,
    "edit_mask": masked,
    "edit_residual": kept,
    "capture_residual": caught,
    "capture": captured,
    "on_feed": lambda m, seen: on_feed(m, lambda feed: seen.append(("feed", feed.start, feed.new))),
    "add_to_residual": lambda m, _: add_to_residual(m, {2: torch.linspace(-2, 2, 32)}),
    "patch_resid": lambda m, _: patch_resid(m, 1, [4, 20], torch.ones(1, 32)),
    "edit_inputs": lambda m, _: edit_inputs(m, {decoder_layers(m)[1].mlp: lambda x: x * 1.5}),
    "edit_outputs": lambda m, _: edit_outputs(m, {decoder_layers(m)[3].mlp: lambda x: x * 0.5}),
    "clamp_neurons": lambda m, _: clamp_neurons(m, {1: {3: 5.0}}),
    "clamp_up": lambda m, _: clamp_neurons(m, {3: {3: 5.0}}, side="up"),
    "ablate_heads": lambda m, _: ablate_heads(m, {0: [1]}),
    "suppress": lambda m, _: suppress(m, [(5, 8)]),
    "skip_layers": lambda m, _: skip_layers(m, {0, 1, 3}),
    "skip_others": lambda m, _: skip_layers(m, {0, 2, 3}),
    "mask_layers": lambda m, _: mask_layers(m, KEPT),
    "skipdecode": lambda m, _: SkipDecode(e_min=3, e_max=3, planned_new_tokens=4)(m),
    "skipdecode_again": lambda m, _: SkipDecode(depths=[2], warmup=1, planned_new_tokens=4)(m),
    "cutter": lambda m, _: CacheCutter(m, FirstLast(2), dict.fromkeys(range(4), 9)),
    "prepending": lambda m, _: TokenPrepending()(m, slot_token_id=SLOT),
}
ALONE = {"prepending", "mask_layers"}  # take a whole text at a time
NAMES = sorted(CONTEXTS)


def states(model):
    """Everything a context may change and forget: hooks, attributes, blocks, the attention that is used."""
    attributes = {name: sorted(k for k in vars(m) if k != "config") for name, m in model.named_modules()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    blocks = [id(b) for b in decoder_layers(model)]
    return attributes, hooks, blocks, model.config._attn_implementation, id(decoder_layers(model)._modules)


def answer(model, names):
    """Logits of a prompt and of a token after it, or why they are refused."""
    try:
        out = model(IDS)
        if ALONE & set(names):
            return [out.logits]
        return [out.logits, model(NEXT, past_key_values=out.past_key_values).logits]
    except InputError as refusal:
        return str(refusal)


def same(a, b):
    return a == b if isinstance(a, str) or isinstance(b, str) else all(map(torch.equal, a, b))


def after(model, names, leaving=()):
    """What the model answers, and what contexts have seen of it, when all of `names` have entered and some have left.
    The rest leaves in the order of entering."""
    before, opened, seen = states(model), {}, {name: [] for name in names}
    with ExitStack() as in_any_case:
        for name in names:
            stack = opened[name] = ExitStack()
            in_any_case.callback(stack.close)
            stack.enter_context(CONTEXTS[name](model, seen[name]))
        if leaving:
            answer(model, names)
        for name in leaving:
            opened.pop(name).close()
            seen.pop(name)
        for notes in seen.values():
            notes.clear()
        found = answer(model, opened)
        for stack in opened.values():
            stack.close()
    assert own_hooks(model) == [] and states(model) == before
    return found, seen


# --- in any order ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return build("llama")


@torch.no_grad()
@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(NAMES), min_size=2, max_size=5, unique=True), st.data())
def test_what_has_left_acts_no_more_and_what_has_not_goes_on(model, names, data):
    leaving = data.draw(st.permutations(names))[: data.draw(st.integers(1, len(names)))]
    rest = [name for name in names if name not in leaving]
    plain = answer(model, [])
    found, seen = after(model, names, leaving)
    expected, noted = after(model, rest)
    assert same(found, expected) and seen == noted
    assert same(answer(model, []), plain)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_context_acts(model, name):
    found, seen = after(model, [name])
    assert seen[name] or not same(found, answer(model, []))


@torch.no_grad()
def test_a_model_is_whole_while_it_skips_layers(model):
    """Weights, hooks and attention modules of a skipped block are found, so that whoever comes then sees all of it."""
    names, mark = [n for n, _ in model.named_parameters()], fingerprint(model)
    with skip_layers(model, {0, 1}):
        assert [n for n, _ in model.named_parameters()] == names and fingerprint(model) == mark
        assert all(isinstance(block, type(decoder_layers(model)[0])) for block in decoder_layers(model))


@torch.no_grad()
def test_a_trace_of_skipped_layers_shows_what_passes_them(model):
    with SkipDecode(e_min=2, warmup=1, planned_new_tokens=6)(model), capture(model, hidden=range(5)) as run:
        ids = model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert all(len(run.trace.hidden(i)) == ids.shape[1] - 1 for i in range(5))
    assert torch.equal(run.trace.hidden(2)[-1], run.trace.hidden(3)[-1])  # layer 2 is skipped at the end


@torch.no_grad()
def test_one_context_object_opens_once(model):
    context = TokenPrepending()(model, slot_token_id=SLOT)
    with pytest.raises(InputError, match="is open already"), context, context:
        pass
    with context:  # and again later
        model(IDS)
    assert own_hooks(model) == []


# --- by one thread ---------------------------------------------------------------------------------------------------


def elsewhere(function, *args):
    with ThreadPoolExecutor(1, "worker") as pool:
        return pool.submit(torch.no_grad()(function), *args).result()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_another_thread_is_refused(model, name):
    plain, expected = answer(model, []), after(model, [name])
    with ExitStack() as stack:
        stack.enter_context(CONTEXTS[name](model, []))
        assert "'MainThread' has changed this model" in elsewhere(answer, model, [])
        for other in NAMES:
            with pytest.raises(InputError, match="has changed this model"):
                elsewhere(after, model, [other])
    found, seen = elsewhere(after, model, [name])
    assert same(found, expected[0]) and seen == expected[1]
    assert same(elsewhere(answer, model, []), plain) and same(answer(model, []), plain)


@torch.no_grad()
def test_a_forward_that_was_under_way_does_not_meet_the_changes(model):
    """The second thread is inside the second block when the first one enters; no context may act on it."""
    for name in NAMES:
        inside, go_on = threading.Event(), threading.Event()

        def wait(*_, inside=inside, go_on=go_on):
            if threading.current_thread() is not threading.main_thread() and not inside.is_set():
                inside.set()
                go_on.wait(10)

        plain = model(IDS).logits
        handle = decoder_layers(model)[1].mlp.register_forward_pre_hook(wait)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(answer, model, ["prepending"])
            assert inside.wait(10)
            seen = []
            with ExitStack() as stack:
                stack.enter_context(CONTEXTS[name](model, seen))
                go_on.set()
                found = running.result()
                assert seen == [], name
            handle.remove()
        assert (isinstance(found, str) and "has changed this model" in found) or torch.equal(found[0], plain), name


@contextmanager
def nothing(model):
    yield


RUNS = {
    "skipdecode": (SkipDecode(e_min=2, warmup=1, planned_new_tokens=6), {}),
    "layer policy": (nothing, {"custom_generate": loop, "layer_policy": SkipDecode(e_min=2, warmup=1)}),
    "early exit": (nothing, {"custom_generate": speculative, "drafter": "early-exit"}),
    "cutter": (lambda m: CacheCutter(m, FirstLast(2), dict.fromkeys(range(4), 9)), {}),
    "capture": (lambda m: capture(m, hidden=[1, 3], qk="all"), {}),
}


@pytest.mark.parametrize("kind", RUNS)
def test_two_threads_never_write_wrong_texts(model, kind):
    context, options = RUNS[kind]
    if "layer_policy" in options:
        options = {**options, "layer_policy": options["layer_policy"].plugins(model, None).layer_policy}

    def write(context, **options):
        with torch.no_grad(), context(model):
            return model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=None, **options).tolist()

    plain, changed = write(nothing), write(context, **options)
    done, texts = threading.Event(), []

    def others():
        while not done.is_set():
            try:
                texts.append(write(nothing))
            except InputError as refusal:
                texts.append(str(refusal))

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(others)
        try:
            mine = [write(context, **options) for _ in range(15)]
        finally:
            done.set()
        running.result()
    assert all(text == changed for text in mine)
    wrong = [text for text in texts if text != plain and "has changed this model" not in text]
    assert texts and not wrong
    assert own_hooks(model) == []


def test_a_checkpointed_backward_runs_forwards_again(model):
    twin = copy.deepcopy(model).train()
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            twin.activation_checkpointing_enable()
        twin.zero_grad()
        with edit_residual(twin, {1: lambda h: h * 2}), edit_outputs(twin, {twin.model.layers[2].mlp: lambda y: -y}):
            twin(IDS, labels=IDS).loss.backward()
        grads.append(twin.model.layers[0].mlp.up_proj.weight.grad.clone())
    assert torch.allclose(*grads, atol=1e-6)


def test_models_may_be_loaded_by_several_threads_at_once(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda _: load(tmp_path, device="cpu").model, range(24)))
    for found in loaded:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.parameters(), strict=True))


# --- not on a compiled model -----------------------------------------------------------------------------------------


def wrapped(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def one_block(model):
    model.model.layers[2].compile(backend="eager")
    return model


def one_block_wrapped(model):
    model.model.layers[2] = torch.compile(model.model.layers[2], backend="eager")
    return model


def its_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compiled", [wrapped, in_place, one_block, one_block_wrapped, its_forward])
def test_a_compiled_model_is_refused(model, name, compiled):
    changed = compiled(copy.deepcopy(model))
    with pytest.raises(InputError, match="compiled model bypasses"), CONTEXTS[name](changed, []):
        pass
    assert own_hooks(changed) == []


@torch.no_grad()
def test_a_model_that_generate_has_compiled_is_refused_there(model):
    twin = copy.deepcopy(model)
    compiled = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager", mode="default")}
    compiled["compile_config"]._compile_all_devices = True
    with edit_residual(twin, {1: lambda h: h * 2}), pytest.raises(InputError, match="static cache"):
        twin.generate(IDS, max_new_tokens=3, **compiled)


# --- where a method brings a mask of its own -------------------------------------------------------------------------


def denoiser():
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=3, num_attention_heads=4, bos_token_id=None, mask_token_id=300)
    return make_bidirectional(LlamaForCausalLM(config)).eval()


@pytest.mark.parametrize("watch", ["observe", "edit_mask", "on_feed", "capture"])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_masked_diffusion_inside_other_contexts(watch, cache):
    model = denoiser()
    mask = torch.ones_like(IDS).repeat(2, 1)
    mask[0, :6] = 0
    rows, seen = IDS.repeat(2, 1), []
    for ids, shown in ((rows, mask), (IDS, None)):
        options = {"gen_length": 8, "block_length": 4, "cache": cache}
        plain = diffusion_generate(MaskedDiffusionModel(model), ids, shown, **options)
        try:
            with CONTEXTS[watch](model, seen):
                same = diffusion_generate(MaskedDiffusionModel(model), ids, shown, **options)
        except InputError as refusal:  # a trace follows one text that grows, and this one is fed in pieces
            assert watch == "capture" and "attn_implementation" not in str(refusal)
        else:
            assert torch.equal(same.sequences, plain.sequences)
        assert own_hooks(model) == []


@pytest.mark.parametrize("name", ["observe", "edit_mask", "edit_residual", "capture", "on_feed"])
@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_tidar_inside_other_contexts(model, name, beta):
    options = {"max_new_tokens": 12, "do_sample": False, "custom_generate": tidar_generate, "eos_token_id": None}
    options |= {"mask_token_id": 2, "block_size": 4, "beta": beta}
    plain, seen = model.generate(IDS, **options), []
    with CONTEXTS[name](model, seen):
        assert torch.equal(model.generate(IDS, **options), plain)
    assert seen and own_hooks(model) == []


def test_cache_compression_refuses_what_needs_the_whole_cache(model):
    options = {"max_new_tokens": 12, "do_sample": False, "custom_generate": tidar_generate, "mask_token_id": 2}
    with CacheCutter(model, FirstLast(2), dict.fromkeys(range(4), 9)):
        with pytest.raises(InputError, match="as tidar and draft trees do"):
            model.generate(IDS, **options)
        with pytest.raises(InputError, match="leave cache compression out"):
            model.generate(IDS, max_new_tokens=12, custom_generate=speculative, drafter="ngram")
    with pytest.raises(InputError, match="reads both ways"), CacheCutter(denoiser(), FirstLast(2), {0: 9}):
        pass
