"""Traces: equal to the model's own numbers, to each other however they were collected, and to their saved copy."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from support.attention import KINDS, LENGTH, assert_clean, eager, left_padded, random_ids
from torch.utils._python_dispatch import TorchDispatchMode

from tokenry.core.errors import InputError
from tokenry.hooks.attention import suppress
from tokenry.hooks.residual import edit_residual
from tokenry.models.anatomy import decoder_layers
from tokenry.text.spans import find_spans, text_offsets
from tokenry.trace.recorder import head_logits
from tokenry.trace.reducers import Entropy, SentenceMean, TopKeys
from tokenry.trace.trace import Trace, capture

SPANS = [(0, 9), (9, 21), (21, 40)]
EVERYTHING = {"hidden": [0, 2, -1], "qk": "all", "head_outputs": [0, 3, 17], "neurons": "all"}


def reducers():
    return [SentenceMean(SPANS), TopKeys(5), Entropy()]


def traced(model, ids, tokenizer=None, mask=None, **options):
    with capture(model, tokenizer, **options) as cap, torch.no_grad():
        model(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    return cap.traces


def assert_same(left, right, tolerance=1e-4):
    assert left.tensors.keys() == right.tensors.keys()
    for name, tensor in left.tensors.items():
        if name.endswith("top_keys") or not tensor.is_floating_point():
            assert torch.equal(tensor, right.tensors[name]), name
        else:
            assert torch.allclose(tensor, right.tensors[name], atol=tolerance, equal_nan=True), name


# --- equal to the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_capture_changes_no_token_and_no_logit(make_model, kind):
    model, (ids, mask) = make_model(kind), left_padded()
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    plain = model.generate(ids, **options)
    with capture(model, reducers=reducers(), **EVERYTHING):
        assert torch.equal(plain, model.generate(ids, **options))
    assert_clean(model)
    with capture(model, reducers=reducers(), **EVERYTHING), torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
    with torch.no_grad():
        reference = eager(model)(ids, attention_mask=mask).logits
    assert (logits - reference)[mask.bool()].abs().max() < 1e-4
    assert_clean(model)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_numbers_are_the_models(make_model, kind):
    model, (ids, mask) = make_model(kind), left_padded()
    output = model(ids, attention_mask=mask, output_hidden_states=True)
    for row, trace in enumerate(traced(model, ids, mask=mask, **EVERYTHING)):
        live = mask[row].bool()
        logits, states = output.logits[row, live], [state[row, live] for state in output.hidden_states]
        logprobs = logits.log_softmax(-1)
        assert torch.equal(trace.ids, ids[row, live]) and len(trace) == int(live.sum())
        assert torch.equal(trace.position_ids, live.nonzero().squeeze(1))
        assert torch.allclose(trace.logits(), logits, atol=1e-5)
        assert torch.allclose(trace.logits([3, 1]), logits[[3, 1]], atol=1e-5)
        assert torch.allclose(trace.lse[1:], logits[:-1].logsumexp(-1), atol=1e-4)
        assert torch.allclose(trace.logprob[1:], logprobs[:-1].gather(1, trace.ids[1:, None])[:, 0], atol=1e-4)
        assert torch.allclose(trace.entropy[1:], -(logprobs.exp() * logprobs).sum(-1)[:-1], atol=1e-4)
        assert trace.logprob[0].isnan() and trace.entropy[0].isnan() and trace.lse[0].isnan()
        assert torch.equal(trace.hidden(0), states[0]) and torch.equal(trace.hidden(2), states[2])
        assert torch.equal(trace.hidden("final"), states[4])  # the last of hidden_states is after the norm,
        assert torch.allclose(model.base_model.norm(trace.hidden(-1)), states[4])  # the last of resid before it
        assert torch.equal(trace.hidden(4), trace.hidden(-1))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_rebuilt_maps_equal_eager_maps(make_model, kind):
    model, (ids, mask) = make_model(kind), left_padded()
    maps = eager(model)(ids, attention_mask=mask, output_attentions=True).attentions
    for row, trace in enumerate(traced(model, ids, mask=mask, qk="all")):
        live = mask[row].bool()
        for layer, whole in enumerate(maps):
            whole = whole[row][:, live][:, :, live]
            assert torch.allclose(trace.attention(layer), whole, atol=1e-5), (kind, row, layer)
            part = trace.attention(layer, heads=[3, 0], rows=slice(5, 9))
            assert torch.allclose(part, whole[[3, 0], 5:9], atol=1e-5)
        assert trace.tensors["k.0"].shape == (len(trace), 2, 8)  # key heads are not repeated


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_head_outputs_sum_to_the_sublayer(make_model, kind):
    model, (ids, mask) = make_model(kind), left_padded()
    outputs = {}
    with torch.no_grad():
        handles = [
            block.self_attn.register_forward_hook(lambda m, a, out: outputs.update({m.layer_idx: out[0]}))
            for block in decoder_layers(model)
        ]
        traces = traced(model, ids, mask=mask, head_outputs=[0, 3, 17, 30])
        for handle in handles:
            handle.remove()
    for row, trace in enumerate(traces):
        live = mask[row].bool()
        present = [p for p in (0, 3, 17, 30) if p < len(trace)]
        assert trace.tensors["positions"].tolist() == present
        for layer, block in enumerate(decoder_layers(model)):
            split = block.self_attn.o_proj.weight.unflatten(1, (-1, 8))  # (width, heads, head_dim)
            parts = torch.einsum("phd,whd->phw", trace.head_outputs(layer), split)
            assert torch.allclose(parts.sum(1), outputs[layer][row, live][present], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_neurons_are_what_the_mlp_writes_from(make_model, kind):
    model, (ids, mask) = make_model(kind), left_padded()
    outputs = {}
    handles = [
        block.mlp.register_forward_hook(lambda m, a, out, i=i: outputs.update({i: out}))
        for i, block in enumerate(decoder_layers(model))
    ]
    traces = traced(model, ids, mask=mask, neurons=[3, 1])
    for handle in handles:
        handle.remove()
    for row, trace in enumerate(traces):
        for layer in (1, 3):
            written = decoder_layers(model)[layer].mlp.down_proj(trace.neurons(layer))
            assert torch.allclose(written, outputs[layer][row, mask[row].bool()], atol=1e-5)
        with pytest.raises(InputError, match=r"neurons=\[0\]"):
            trace.neurons(0)
    with pytest.raises(InputError, match="layer 4"):
        traced(model, ids, neurons=[4])
    assert_clean(model)


# --- however it was collected --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_generation_and_teacher_forcing_give_the_same_trace(make_model, kind):
    model, (ids, mask) = make_model(kind), left_padded()
    with capture(model, reducers=reducers(), **EVERYTHING) as cap:
        out = model.generate(ids, attention_mask=mask, max_new_tokens=14, do_sample=False, eos_token_id=None)
    fed = out[:, :-1]  # the newest token was never fed
    mask = torch.nn.functional.pad(mask, (0, 13), value=1)
    for row, trace in enumerate(cap.traces):
        alone = fed[row : row + 1, mask[row].bool()]
        forced = traced(model, alone, reducers=reducers(), **EVERYTHING)[0]
        # positions of a padded row are those of the row alone in `generate`
        assert_same(trace, forced)
        assert trace.spans["prompt"] == [(0, len(trace) - 13)] and forced.spans["prompt"] == []
        assert forced.with_prompt(len(trace) - 13).spans == trace.spans


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_reducers_equal_the_reduction_of_stored_maps(make_model, kind, monkeypatch):
    monkeypatch.setattr("tokenry.trace.recorder.ROWS", 7)
    model, (ids, mask) = make_model(kind), left_padded()
    for trace in traced(model, ids, mask=mask, qk="all", reducers=reducers()):
        maps = torch.stack([trace.attention(layer) for layer in range(4)])
        means = torch.zeros(4, 4, 3, 3)
        for i, (a, b) in enumerate(SPANS):
            for j, (c, d) in enumerate(SPANS):
                means[:, :, i, j] = maps[:, :, a:b, c:d].sum((-1, -2)) / ((b - a) * (d - c))
        assert torch.allclose(trace.reduced["sentence_mean"], means, atol=1e-6)
        assert torch.allclose(trace.reduced["attention_entropy"], torch.special.entr(maps).sum(-1), atol=1e-5)
        keys, weights = trace.reduced["top_keys"], trace.reduced["top_weights"]
        assert torch.allclose(weights, maps.topk(5).values, atol=1e-6)
        assert torch.allclose(maps.gather(-1, keys.clamp(min=0)) * (keys >= 0), weights, atol=1e-6)
        assert (keys[:, :, 1, 2:] == -1).all() and (weights[:, :, 1, 2:] == 0).all()


@torch.no_grad()
def test_captures_nest(llama):
    ids = random_ids()
    with capture(llama, qk=[1]) as outer, capture(llama, hidden=[2], reducers=[Entropy()]) as inner:
        llama(ids)
    assert torch.equal(outer.trace.logprob[1:], inner.trace.logprob[1:])
    assert "q.1" in outer.trace.tensors and "q.1" not in inner.trace.tensors
    assert_clean(llama)


@torch.no_grad()
def test_tokens_taken_back_leave_the_trace_and_a_new_start_replaces_it(llama):
    ids = random_ids()
    with capture(llama, hidden=[1], qk="all") as cap:
        cache = llama(ids).past_key_values
        cache.crop(-10)
        llama(ids[:, :3], past_key_values=cache)
    whole = torch.cat([ids[:, :30], ids[:, :3]], 1)
    assert_same(cap.trace, traced(llama, whole, hidden=[1], qk="all")[0])
    with capture(llama, reducers=[Entropy()]) as cap:
        llama(ids), llama(ids[:, :5])
    assert_same(cap.trace, traced(llama, ids[:, :5], reducers=[Entropy()])[0])


@pytest.mark.parametrize("setting", [{"final_logit_softcapping": 2.0}, {"logits_scaling": 4.0}])
@torch.no_grad()
def test_capping_and_scaling_come_from_the_config(make_model, setting):
    from transformers import GraniteConfig, GraniteForCausalLM

    if "logits_scaling" in setting:
        sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        model = GraniteForCausalLM(GraniteConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, **setting))
    else:
        model = copy.deepcopy(make_model("gemma3"))
        model.config.final_logit_softcapping = 2.0
    ids = random_ids()
    assert torch.allclose(traced(model.eval(), ids)[0].logits(), model(ids).logits[0], atol=1e-5)


@torch.no_grad()
def test_no_map_of_the_whole_sequence_exists(llama):
    length, largest = 300, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made = out if isinstance(out, tuple | list) else [out]
            largest.extend(tuple(t.shape) for t in made if isinstance(t, torch.Tensor) and t.dim() > 1)
            return out

    with Watch():
        traced(llama, random_ids(length=length), qk="all", head_outputs=[5], reducers=reducers())
    assert {(1, 4, 128, 256), (1, 4, 44, length)} <= set(largest)  # the watch sees the chunks of the reducers
    assert not [shape for shape in largest if shape[-2:] == (length, length)]


@torch.no_grad()
def test_no_logits_of_the_whole_sequence_exist(llama, monkeypatch):
    monkeypatch.setattr("tokenry.trace.recorder.LOGITS", 320 * 4)
    seen, ids = [], random_ids()
    handle = llama.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.shape[-2]))
    traced(llama, ids)
    handle.remove()
    assert max(seen) == 4


# --- text ----------------------------------------------------------------------------------------------------------


def test_offsets_point_into_the_text(llama, tokenizer):
    text = "The café “sings” 🙂 at night.\nIt was not a dream! Elara listened."
    trace = traced(llama, tokenizer(text, return_tensors="pt").input_ids, tokenizer)[0]
    assert trace.text == text
    pieces = [text[a:b] for a, b in trace.offsets.tolist()]
    for token, piece in zip(trace.ids.tolist(), pieces):
        decoded = tokenizer.decode([token])
        assert decoded == piece or "\ufffd" in decoded
    assert sum("🙂" in piece for piece in pieces) > 1  # its bytes are several tokens, which share the character
    sentences = [text[trace.offsets[a, 0] : trace.offsets[b - 1, 1]].strip() for a, b in trace.spans["sentences"]]
    assert sentences == ["The café “sings” 🙂 at night.", "It was not a dream!", "Elara listened."]


def test_roles_follow_the_thinking_tags(tokenizer):
    def roles(text, prompt_text):
        ids = tokenizer(text).input_ids
        found, offsets = text_offsets(tokenizer, ids)
        starts = offsets[:, 0].contiguous()
        prompt = len(tokenizer(prompt_text).input_ids)
        spans = find_spans(found, starts, len(ids), prompt)
        return {name: "".join(tokenizer.decode(ids[a:b]) for a, b in spans[name]) for name in spans}

    whole = roles("the sea? <think>a night</think> a tower.", "the sea? ")
    assert whole["prompt"] == "the sea? " and whole["think"].endswith("</think>") and whole["answer"] == " a tower."
    assert roles("the sea? <think>a night</think> a tower.", "the sea? <think>")["answer"] == " a tower."
    assert roles("the sea? <think>a night", "the sea? <think>")["answer"] == ""
    assert roles("the sea? a tower.", "the sea?") == {
        "prompt": "the sea?",
        "think": "",
        "answer": " a tower.",
        "sentences": " a tower.",
    }


def test_every_token_has_a_role(llama, tokenizer):
    ids = tokenizer("the lighthouse", return_tensors="pt").input_ids
    with capture(llama, tokenizer) as cap:
        llama.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert cap.trace.roles == ["prompt"] * ids.shape[1] + ["answer"] * 5
    with pytest.raises(InputError, match="prompt of 99 tokens"):
        cap.trace.with_prompt(99)


# --- files ---------------------------------------------------------------------------------------------------------


def test_save_and_load(llama, tokenizer, tmp_path):
    trace = traced(llama, random_ids(), tokenizer, reducers=reducers(), **EVERYTHING)[0].with_prompt(7)
    trace.save(tmp_path / "t.safetensors")
    again = Trace.load(tmp_path / "t.safetensors", llama)
    assert_same(trace, again, tolerance=0)
    assert again.header | {"spans": 0} == trace.header | {"spans": 0}
    assert (again.spans, again.text, again.roles) == (trace.spans, trace.text, trace.roles)
    assert torch.equal(again.logits([4]), trace.logits([4]))
    assert torch.equal(again.attention(2, [1]), trace.attention(2, [1]))
    assert again.header["dtype"] == "float32" and again.header["format"] == 1
    assert Trace.load(tmp_path / "t.safetensors", copy.deepcopy(llama)).model is not None
    with pytest.raises(InputError, match="need the model"):
        Trace.load(tmp_path / "t.safetensors").logits()


def test_other_models_and_other_files_are_refused(llama, make_model, tmp_path):
    path = tmp_path / "t.safetensors"
    trace = traced(llama, random_ids())[0]
    trace.save(path)
    other, turned = copy.deepcopy(llama), copy.deepcopy(llama)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.01)
        other.model.embed_tokens.weight.mul_(1.1)
    turned.config.rope_parameters = {**turned.config.rope_parameters, "rope_theta": 77.0}  # same weights
    for model in (make_model("qwen2"), other, turned):
        with pytest.raises(InputError, match="another model"):
            Trace.load(path, model)
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match="no trace header"):
        Trace.load(tmp_path / "plain.safetensors")
    (tmp_path / "text.safetensors").write_text("not a file of tensors")
    for name in ("text.safetensors", "absent.safetensors"):
        with pytest.raises(InputError, match="cannot be read"):
            Trace.load(tmp_path / name)
    trace.header["format"] = 99
    trace.save(path)
    with pytest.raises(InputError, match="format 99"):
        Trace.load(path)


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"hidden": [6]}, {"hidden": [-6]}, {"qk": [4]}, {"qk": [-1]}])
def test_unknown_layers_are_refused(llama, options):
    with pytest.raises(InputError, match=r"6 does not exist|qk=\["), capture(llama, **options):
        pass
    assert_clean(llama)


@torch.no_grad()
def test_what_was_not_captured_is_refused(llama):
    trace = traced(llama, random_ids(), qk=[1])[0]
    for call, option in [
        (lambda: trace.hidden(2), r"hidden=\[2\]"),
        (lambda: trace.attention(0), r"qk=\[0\]"),
        (lambda: trace.head_outputs(0), "head_outputs"),
        (lambda: trace.offsets, "tokenizer"),
    ]:
        with pytest.raises(InputError, match=option):
            call()
    with capture(llama, qk=[1]) as cap:
        with suppress(llama, [(2, 5)]):  # for the prompt only
            cache = llama(random_ids()).past_key_values
        llama(random_ids(length=1), past_key_values=cache)
    with pytest.raises(InputError, match="edited"):
        cap.trace.attention(1)


@torch.no_grad()
def test_what_cannot_be_followed_is_refused(llama):
    ids = random_ids()
    with pytest.raises(InputError, match="eager"), capture(eager(llama), qk="all"):
        pass
    assert len(traced(eager(llama), ids, hidden=[1])[0]) == LENGTH  # hidden states need no attention
    with pytest.raises(InputError, match="compiled"), capture(torch.compile(llama)):
        pass
    cache = llama(ids).past_key_values
    with pytest.raises(InputError, match="40 tokens, 0 were traced"), capture(llama):
        llama(ids[:, :1], past_key_values=cache)
    with pytest.raises(InputError, match="inputs_embeds"), capture(llama):
        llama(inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(InputError, match="one sequence"), capture(llama):
        cache = llama(random_ids(2)).past_key_values
        cache.crop(-3)
        llama(random_ids(2, 1), past_key_values=cache)
    with pytest.raises(InputError, match="reducers"), capture(llama, reducers=[Entropy()]):
        cache = llama(ids).past_key_values
        cache.crop(-3)
        llama(ids[:, :1], past_key_values=cache)
    with pytest.raises(InputError, match="2-D mask"), capture(llama):
        llama(random_ids(2), attention_mask=torch.zeros(2, 1, LENGTH, LENGTH))
    with pytest.raises(InputError, match=r"use \.traces"):
        with capture(llama) as cap:
            llama(random_ids(2))
        _ = cap.trace
    with capture(llama) as cap, pytest.raises(InputError, match="after the with"):
        _ = cap.trace
    assert_clean(llama)


@torch.no_grad()
def test_a_compressed_cache_is_followed_but_its_maps_are_refused(llama):
    ids = random_ids()

    def run(**options):
        with capture(llama, **options) as cap:
            cache = llama(ids).past_key_values
            for layer in cache.layers:  # drop columns 5 to 9, as a selector would
                keep = [i for i in range(LENGTH) if not 5 <= i < 10]
                layer.keys, layer.values = layer.keys[:, :, keep], layer.values[:, :, keep]
            llama(ids[:, :1], past_key_values=cache, position_ids=torch.tensor([[LENGTH]]))
        return cap.trace

    trace = run(hidden=[1])
    assert len(trace) == LENGTH + 1 and trace.hidden(1).shape[0] == LENGTH + 1
    for options in ({"qk": "all"}, {"reducers": [Entropy()]}):
        with pytest.raises(InputError, match="36 keys for 41 tokens"):
            run(**options)


@torch.no_grad()
def test_logits_changed_after_the_head_are_refused(llama):
    class Scaled(type(llama)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 0.5
            return output

    twin = copy.deepcopy(llama)
    twin.__class__ = Scaled
    with pytest.raises(InputError, match="not its output embeddings times"), capture(twin):
        twin(random_ids())
    assert_clean(twin)


def test_reducer_parameters_are_checked():
    with pytest.raises(InputError, match="m=0"):
        TopKeys(0)
    with pytest.raises(InputError, match=r"\(4, 4\) is empty"):
        SentenceMean([(0, 4), (4, 4)])


def test_head_logits_are_exact(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer("The lighthouse stood on the cliff.", return_tensors="pt").input_ids
    trace = traced(model, ids, tokenizer, qk=[0, 17])[0]
    with torch.no_grad():
        reference = model(ids).logits[0]
    assert torch.equal(trace.logits(), reference)
    assert torch.equal(head_logits(model, trace.hidden("final")), reference)
    assert trace.text == "The lighthouse stood on the cliff." and trace.attention(17).shape == (
        9,
        len(trace),
        len(trace),
    )


def test_text_decoded_with_rewinds_is_traced_as_it_ended(llama, tokenizer):
    from tokenry.decode.api import generate
    from tokenry.decode.generation.monitor import Violation

    class RejectOnce:
        """At the tenth token, ban the one at index 5."""

        def __init__(self):
            self.rejected = []

        def check(self, row):
            if len(row.ids) == 10 and not self.rejected:
                self.rejected.append(row.ids[5])
                return Violation(5, "test", {row.ids[5]: 0.0})
            return None

        def hold(self, row):
            return None

    monitor, options = RejectOnce(), {"chat": False, "do_sample": False, "max_new_tokens": 16, "eos_token_id": None}
    with capture(llama, tokenizer, hidden=[1], qk="all") as cap:
        out = generate(llama, tokenizer, "the old lighthouse", monitors=[monitor], **options)
    assert monitor.rejected and out.sequences[0, -11] != monitor.rejected[0]
    assert torch.equal(cap.trace.ids, out.sequences[0, :-1])
    assert_same(cap.trace, traced(llama, cap.trace.ids[None], tokenizer, hidden=[1], qk="all")[0])


def test_a_trace_knows_its_model_again_after_saving_it(llama, tmp_path):
    from transformers import AutoModelForCausalLM

    with capture(llama) as cap, torch.no_grad():
        llama(torch.tensor([[5, 6, 7]]), use_cache=False)
    cap.trace.save(tmp_path / "t.safetensors")
    llama.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(Trace.load(tmp_path / "t.safetensors", loaded).logits([1]), cap.trace.logits([1]))


def test_learned_positions_and_a_body_inside_the_body(make_model, tokenizer):
    """OPT's decoder is called past its base model; left padding is stripped, positions are the model's own."""
    model = make_model("opt")
    batch = tokenizer(["the old lighthouse", "the sea"], return_tensors="pt", padding=True)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with capture(model, tokenizer) as cap, torch.no_grad():
        model(**inputs, use_cache=False)
    for trace, text in zip(cap.traces, ("the old lighthouse", "the sea")):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            expected = model(ids).logits[0]
        assert trace.ids.tolist() == ids[0].tolist()
        assert torch.allclose(trace.logits(), expected, atol=1e-4)


@pytest.mark.parametrize("capturing", [{"qk": "all"}, {"head_outputs": [0, 4]}])
@torch.no_grad()
def test_a_forward_that_came_to_no_end_leaves_nothing_in_the_trace(llama, capturing):
    ids = torch.arange(5, 13)[None]

    def fails(hidden):
        raise ZeroDivisionError

    with capture(llama, hidden=[1, 3], **capturing) as cap:
        cache = llama(ids[:, :6]).past_key_values
        with pytest.raises(ZeroDivisionError), edit_residual(llama, {2: fails}):
            llama(ids[:, 6:7], past_key_values=copy.deepcopy(cache))
        llama(ids[:, 6:], past_key_values=cache)
        with pytest.raises(ZeroDivisionError), edit_residual(llama, {2: fails}):
            llama(ids[:, :1], past_key_values=cache)
    with capture(llama, hidden=[1, 3], **capturing) as plain:
        cache = llama(ids[:, :6]).past_key_values
        llama(ids[:, 6:], past_key_values=cache)
    assert cap.trace.tensors.keys() == plain.trace.tensors.keys()
    for name, tensor in plain.trace.tensors.items():
        torch.testing.assert_close(cap.trace.tensors[name], tensor, rtol=0, atol=0, equal_nan=True)
