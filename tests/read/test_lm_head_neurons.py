"""The neuron map against the whole product, what a clamp does, and the refusals."""

import copy
import json
import math

import pytest
import torch
from click.testing import CliRunner
from support.attention import assert_clean, random_ids
from transformers import MixtralConfig, MixtralForCausalLM, Phi3Config, Phi3ForCausalLM

from tokenry import load
from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.evidence.lm_head_neurons import METHOD, PLAIN, RANDOM, build
from tokenry.hooks.neurons import clamp_neurons
from tokenry.hooks.residual import edit_outputs
from tokenry.measure.claims import verdict
from tokenry.measure.compare import compare
from tokenry.measure.tasks.clamp import PROMPTS
from tokenry.models.anatomy import decoder_layers, fingerprint, gated_mlp, unembedding
from tokenry.read import LMHeadNeurons, NeuronMap, Reading, clamp_effect, top_tokens
from tokenry.read.weights.directions import neuron_rows, norm_gain
from tokenry.trace.trace import Trace, capture

SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0}


@pytest.fixture
def names(llama, tokenizer):
    return LMHeadNeurons(top_k=4, chunk=24, bottom=True).map(llama, tokenizer)


def phi3():
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**SIZES, **HEADS)).eval()


# --- the product -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [5, 320, 1031, 2051])
@pytest.mark.parametrize("k", [1, 4, 5])
def test_top_tokens_equal_the_whole_product(vocabulary, k):
    torch.manual_seed(vocabulary)
    rows, head = 3 * torch.randn(37, 24), torch.randn(vocabulary, 24)
    found = top_tokens(rows, head, k, bottom=True)
    whole = rows.double() @ head.double().T
    best, worst = whole.topk(k), (-whole).topk(k)
    assert torch.equal(found.ids.long(), best.indices) and torch.equal(found.bottom_ids.long(), worst.indices)
    for mine, exact in (
        (found.logits, best.values),
        (found.bottom_logits, -worst.values),
        (found.lse, whole.logsumexp(-1)),
    ):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-5)


def test_all_tokens_can_be_kept_and_large_logits_do_not_overflow():
    torch.manual_seed(0)
    rows, head = 100 * torch.randn(3, 16), torch.randn(50, 16)
    found, whole = top_tokens(rows, head, 50), rows @ head.T
    assert torch.equal(found.ids.long().sort(-1).values, torch.arange(50).expand(3, 50))
    torch.testing.assert_close(found.lse, whole.logsumexp(-1))
    assert found.lse.max() > 200  # exp of it is beyond float32


def test_half_precision_weights_are_multiplied_in_float32():
    rows, head = torch.full((2, 4096), 5.0), torch.full((9, 4096), 5.0, dtype=torch.float16)
    assert torch.equal(top_tokens(rows, head, 1).logits, torch.full((2, 1), 25.0 * 4096))  # float16 ends at 65504


@pytest.mark.parametrize("side", ["up", "gate", "down"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_map_is_that_of_the_whole_matrix_whatever_the_chunk(make_model, tokenizer, kind, side):
    model = make_model(kind)
    one = LMHeadNeurons(side=side, top_k=3, chunk=64).map(model, tokenizer)
    two = LMHeadNeurons(side=side, top_k=3, chunk=7).map(model, tokenizer)
    assert torch.equal(one.tensors["ids"], two.tensors["ids"]) and one.shape == (4, 64)
    for layer, block in enumerate(model.base_model.layers):
        weight = getattr(block.mlp, f"{side}_proj").weight
        logits = (weight.T if side == "down" else weight).detach() @ model.get_output_embeddings().weight.T
        probabilities = logits.softmax(-1)
        assert torch.equal(one.top[layer].long(), logits.argmax(-1))
        torch.testing.assert_close(one.probability[layer], probabilities.amax(-1), atol=1e-6, rtol=1e-4)
        first, second = logits.topk(2).values.unbind(-1)
        gap = (first - second) / logits.std(-1, correction=0)
        torch.testing.assert_close(one.gap[layer], gap.detach(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@torch.no_grad()
def test_the_folded_norm_is_what_the_neuron_reads(make_model, kind):
    model = copy.deepcopy(make_model(kind))
    block = model.base_model.layers[2]
    norm = block.pre_feedforward_layernorm if kind == "gemma3" else block.post_attention_layernorm
    norm.weight.normal_()
    x = torch.randn(5, 32)
    read = block.mlp.up_proj(norm(x)) * x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(x @ neuron_rows(model, 2, fold_norm=True).T, read, atol=1e-4, rtol=1e-4)
    gain = norm.weight + 1 if kind == "gemma3" else norm.weight
    torch.testing.assert_close(norm_gain(norm, 32), gain, atol=1e-5, rtol=1e-5)
    model.base_model.norm.weight.normal_()
    columns = neuron_rows(model, 2, "down", fold_norm=True)
    expected = block.mlp.down_proj.weight.T * norm_gain(model.base_model.norm, 32)
    assert torch.equal(columns, expected)


@torch.no_grad()
def test_a_fused_projection_is_gate_first_then_up(tokenizer):
    model = phi3()
    mlp, x = model.model.layers[1].mlp, torch.randn(1, 3, 32)
    gate, up = (neuron_rows(model, 1, side) for side in ("gate", "up"))
    written = mlp.down_proj(torch.nn.functional.silu(x @ gate.T) * (x @ up.T))
    torch.testing.assert_close(mlp(x), written, atol=1e-5, rtol=1e-4)
    with clamp_neurons(model, {1: {5: 2.0}}, side="up"):
        m = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        m[..., 5] = 2.0 * torch.nn.functional.silu(x @ gate.T)[..., 5]
        torch.testing.assert_close(_fed(model, mlp, x), mlp.down_proj(m), atol=1e-5, rtol=1e-4)
    assert LMHeadNeurons(top_k=2).map(model, tokenizer).shape == (2, 64)


def _fed(model, mlp, x):
    """The MLP's output for x within a forward of the model."""
    seen = []
    handles = [
        mlp.register_forward_pre_hook(lambda m, args: (x,)),
        mlp.register_forward_hook(lambda m, args, out: seen.append(out)),
    ]
    model(torch.tensor([[5, 6, 7]]))
    for handle in handles:
        handle.remove()
    return seen[0]


# --- names -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_scaling_keeps_a_name_and_negation_takes_the_bottom_one(llama, tokenizer, names):
    twin = copy.deepcopy(llama)
    weight = twin.model.layers[1].mlp.up_proj.weight
    weight[3] *= 7
    weight[4] *= -1
    changed = LMHeadNeurons(top_k=4, bottom=True).map(twin, tokenizer).tensors
    before = names.tensors
    assert torch.equal(changed["ids"][1, 3], before["ids"][1, 3])
    assert torch.equal(changed["ids"][1, 4], before["bottom_ids"][1, 4])
    assert torch.equal(changed["bottom_ids"][1, 4], before["ids"][1, 4])
    torch.testing.assert_close(changed["bottom_logits"][1, 4], -before["logits"][1, 4])


@torch.no_grad()
def test_a_planted_neuron_is_found_first(llama, tokenizer):
    twin = copy.deepcopy(llama)
    (token,) = tokenizer.encode(" sea")
    head = unembedding(twin)
    twin.model.layers[2].mlp.up_proj.weight[11] = 60 * head[token] / head[token].norm()
    names = LMHeadNeurons(top_k=2).map(twin, tokenizer)
    first = names.find("sea").rows[0]
    assert (first["layer"], first["neuron"], first["form"]) == (2, 11, " sea") and first["probability"] > 0.9
    assert first["cosine_rank"] == 1
    assert names.table(2, limit=1).rows[0]["neuron"] == 11
    assert names.table(2).rows[0]["token"] == " sea"


@torch.no_grad()
def test_find_is_exact_for_tokens_that_are_not_stored(llama, tokenizer, names):
    rows = names.find("the", limit=256).rows
    forms = {tokenizer.encode(form)[0]: form for form in (" the", "the", " The", "The") if _one(tokenizer, form)}
    assert len(rows) == 256 and forms
    for layer in range(4):
        up = llama.model.layers[layer].mlp.up_proj.weight
        probabilities = (up @ llama.get_output_embeddings().weight.T).softmax(-1)
        cosines = torch.nn.functional.normalize(llama.get_output_embeddings().weight, dim=1) @ up.T
        for row in (r for r in rows if r["layer"] == layer):
            token = max(forms, key=lambda t: float(probabilities[row["neuron"], t]))
            assert row["form"] == forms[token]
            assert row["probability"] == pytest.approx(float(probabilities[row["neuron"], token]), rel=1e-4)
            rank = 1 + int((cosines[:, row["neuron"]] > cosines[token, row["neuron"]]).sum())
            assert abs(row["cosine_rank"] - rank) <= 1  # equal up to a rounding
    assert [r["probability"] for r in rows] == sorted((r["probability"] for r in rows), reverse=True)


def _one(tokenizer, form):
    return len(tokenizer.encode(form)) == 1


def test_words_of_several_tokens_are_refused_with_their_pieces(names):
    with pytest.raises(InputError, match=r"'keeper testament' is not one token here but ' ' \+ 'kee' \+ 'per'"):
        names.find("keeper testament")
    with pytest.raises(InputError, match="empty"):
        names.find("  ")
    for bad, message in ((lambda: names.table(4), "layer 4"), (lambda: names.neurons([(0, 64)]), "neuron 64")):
        with pytest.raises(InputError, match=message):
            bad()


# --- two models ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_overlap_is_one_with_itself_and_falls_with_noise(llama, tokenizer, names):
    same = names.overlap(names)
    assert same.share == 1 and all(share == 1 for share, _ in same.by_layer)
    shares = [1.0]
    for size in (0.05, 0.3, 100.0):
        twin = copy.deepcopy(llama)
        torch.manual_seed(1)
        for block in twin.model.layers[2:]:
            weight = block.mlp.up_proj.weight
            weight += size * weight.std() * torch.randn_like(weight)
        found = names.overlap(LMHeadNeurons(top_k=2).map(twin, tokenizer))
        shares.append(found.share)
        assert [share for share, _ in found.by_layer[:2]] == [1, 1]
    assert shares == sorted(shares, reverse=True) and shares[1] > 0.9 and shares[3] < 0.6
    chance = sum(
        float((names.top[3] == t).float().mean() * (names.top[3] == t).float().mean()) for t in names.top[3].unique()
    )
    assert same.by_layer[3][1] == pytest.approx(chance)


def test_maps_that_cannot_be_compared_are_refused(llama, tokenizer, names):
    other = LMHeadNeurons(side="gate", top_k=2).map(llama, tokenizer)
    with pytest.raises(InputError, match="side and fold_norm"):
        names.overlap(other)
    with pytest.raises(InputError, match=r"\(4, 64\) and \(2, 64\)"):
        names.overlap(LMHeadNeurons(top_k=2).map(phi3(), tokenizer))
    smaller = NeuronMap(names.tensors, {**names.header, "vocabulary": 300})
    with pytest.raises(InputError, match="320 and 300"):
        names.overlap(smaller)
    renamed = NeuronMap(names.tensors, {**names.header, "texts": {i: "x" for i in names.header["texts"]}})
    with pytest.raises(InputError, match="different vocabularies"):
        names.overlap(renamed)


# --- files -----------------------------------------------------------------------------------------------------------


def test_maps_are_saved_and_bound_to_their_model(llama, make_model, tokenizer, names, tmp_path):
    path = tmp_path / "map.safetensors"
    names.save(path)
    again = NeuronMap.load(path, llama, tokenizer)
    assert again.header == names.header and again.find("sea") == names.find("sea")
    assert all(torch.equal(t, again.tensors[n]) for n, t in names.tensors.items())
    with pytest.raises(InputError, match="not for the weights"):
        NeuronMap.load(path, make_model("qwen2"))
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(InputError, match="cannot be read as a map"):
        NeuronMap.load(tmp_path / "text")
    names.header["format"] = 9
    names.save(path)
    with pytest.raises(InputError, match="format 9"):
        NeuronMap.load(path)


def test_a_trace_is_no_map(llama, tmp_path):
    traced(llama, random_ids()).save(tmp_path / "t.safetensors")
    with pytest.raises(InputError, match="no header of a neuron map"):
        NeuronMap.load(tmp_path / "t.safetensors")


def test_a_map_alone_searches_what_it_stores_and_says_so(names, tmp_path):
    names.save(tmp_path / "map.safetensors")
    alone = NeuronMap.load(tmp_path / "map.safetensors")
    stored = next(t.strip() for t in names.header["texts"].values() if t.strip().isalpha() and len(t) > 2)
    found = alone.find(stored)
    assert "only among the top 4" in found.title
    assert found.rows and all(any(r["form"] == t for t in r["tokens"]) for r in found.rows)
    assert all(r["cosine_rank"] is None for r in found.rows)
    exact = {(r["layer"], r["neuron"]): r["probability"] for r in names.find(stored, limit=256).rows}
    for row in found.rows:
        assert exact[row["layer"], row["neuron"]] == pytest.approx(row["probability"], rel=1e-3)
    with pytest.raises(InputError, match="load it with the model"):
        alone.find("zzzz")


# --- traces ----------------------------------------------------------------------------------------------------------


def traced(model, ids, tokenizer=None, **options) -> Trace:
    with capture(model, tokenizer, **options) as cap, torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    return cap.trace


def test_reading_lists_the_strongest_named_neurons(llama, tokenizer, names):
    ids = tokenizer("the old lighthouse", return_tensors="pt").input_ids
    trace = traced(llama, ids, tokenizer, neurons=[1, 3])
    least = float(names.probability.quantile(0.7))
    reading = LMHeadNeurons(per_token=2, min_prob=least).read(trace, names)
    expected = []
    for t in range(len(trace)):
        found = []
        for layer in (1, 3):
            for j in range(64):
                if names.probability[layer, j] >= least:
                    found.append((float(trace.neurons(layer)[t, j]), layer, j))
        for value, layer, j in sorted(found, key=lambda f: -abs(f[0]))[:2]:
            expected.append((t, layer, j, value, names.text(names.top[layer, j])))
    got = [(r["position"], r["layer"], r["neuron"], r["activation"], r["name"]) for r in reading.rows]
    assert got == expected
    assert "".join(r["token"] for r in reading.rows[::2]) == "the old lighthouse"
    frame = reading.to_frame()
    assert list(frame.columns)[:3] == ["position", "token", "layer"] and len(frame) == len(reading)
    assert reading.plot().row_count == len(reading)
    made = LMHeadNeurons(top_k=2, per_token=2, min_prob=least).read(trace, loaded=(llama, tokenizer))
    assert [r["neuron"] for r in made.rows] == [r["neuron"] for r in reading.rows]


def test_reading_refuses_what_it_cannot_name(llama, make_model, tokenizer, names, monkeypatch):
    method, trace = LMHeadNeurons(), traced(llama, random_ids(), neurons=[1])
    assert LMHeadNeurons(min_prob=1.0).read(trace, names).rows == []
    assert LMHeadNeurons(min_prob=0).read(trace, names).rows[0]["token"] == f"<{int(trace.ids[0])}>"
    with pytest.raises(InputError, match="does not hold neurons"):
        method.read(traced(llama, random_ids()), names)
    with pytest.raises(InputError, match="not for the weights"):
        method.read(traced(make_model("qwen2"), random_ids(), neurons=[1]), names)
    with pytest.raises(InputError, match="model and a tokenizer"):
        method.read(trace)
    with pytest.raises(InputError, match="per_token=0"):
        LMHeadNeurons(per_token=0)
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(InputError, match="pip install pandas"):
        Reading("x", []).to_frame()


# --- clamping --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_clamp_effect_is_the_difference_of_two_models(llama, tokenizer):
    prompts, values = ["the old", "the sound of the sea"], [20.0, -20.0]
    reading = clamp_effect(llama, tokenizer, prompts, (3, 5), values)
    token = int((llama.model.layers[3].mlp.up_proj.weight[5] @ llama.lm_head.weight.T).argmax())
    rows = iter(reading.rows)
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        plain = llama(ids).logits[0, -1].log_softmax(-1)[token]
        for value in values:

            def fixed(u, value=value):
                u = u.clone()
                u[..., 5] = value
                return u

            with edit_outputs(llama, {llama.model.layers[3].mlp.up_proj: fixed}):
                clamped = llama(ids).logits[0, -1].log_softmax(-1)[token]
            row = next(rows)
            assert (row["prompt"], row["value"], row["token"]) == (prompt, value, tokenizer.decode([token]))
            assert row["logprob"] == pytest.approx(float(plain)) and row["change"] == pytest.approx(
                float(clamped - plain), abs=1e-4
            )
    assert len(reading) == 4 and any(abs(r["change"]) > 1e-3 for r in reading.rows)
    assert_clean(llama)


def test_clamp_effect_refusals(llama, tokenizer):
    for prompts, neuron, values, message in (
        (["the"], (3, 64), [1.0], "neuron 64"),
        (["the"], (9, 0), [1.0], "layer 9"),
        ([], (3, 0), [1.0], "0 prompts"),
        (["the"], (3, 0), [], "measure nothing"),
        (["the"], (3, 0), [math.inf], "finite"),
        ([""], (3, 0), [1.0], "no tokens"),
    ):
        with pytest.raises(InputError, match=message):
            clamp_effect(llama, tokenizer, prompts, neuron, values)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_models_that_have_no_such_neurons_are_refused(make_model, tokenizer, llama):
    method = LMHeadNeurons()
    with pytest.raises(InputError, match=r"no mlp\.down_proj"):
        method.map(make_model("opt"), tokenizer)
    config = MixtralConfig(**SIZES, **HEADS, num_local_experts=2)
    with pytest.raises(InputError, match="mixture of experts"):
        method.map(MixtralForCausalLM(config), tokenizer)
    ungated = copy.deepcopy(llama)
    del ungated.model.layers[0].mlp.gate_proj
    with pytest.raises(InputError, match="no gated MLP"):
        gated_mlp(ungated, 0)
    quantized = copy.deepcopy(llama)
    quantized.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(64, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(InputError, match=r"quantized weights \(torch\.int8\)"):
        method.map(quantized, tokenizer)
    offloaded = copy.deepcopy(llama)
    offloaded.model.layers[0].mlp.up_proj.to("meta")
    with pytest.raises(InputError, match="offloaded"):
        method.map(offloaded, tokenizer)


def test_bad_settings_are_refused(llama, tokenizer, make_model):
    for values, message in (
        ({"side": "left"}, "one of up, gate, down"),
        ({"top_k": 0}, "top_k=0"),
        ({"chunk": 0}, "chunk=0"),
    ):
        with pytest.raises(InputError, match=message):
            LMHeadNeurons(**values)
    with pytest.raises(InputError, match="top_k=321 is not allowed; this vocabulary has 1 to 320"):
        LMHeadNeurons(top_k=321).map(llama, tokenizer)
    unnormed = copy.deepcopy(llama)
    del unnormed.model.layers[0].post_attention_layernorm
    with pytest.raises(InputError, match="fold_norm=False"):
        LMHeadNeurons(fold_norm=True).map(unnormed, tokenizer)


# --- the experiment --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experiment(tokenizer):
    """Twelve neurons planted in a random model: each reads and writes one token. With its finished comparison."""
    from support.families import build as make

    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.nn.functional.normalize(torch.randn(320, 32), dim=1) * 4)
        for layer in (1, 2, 3):
            for j in range(4):
                direction = model.lm_head.weight[40 * layer + j]
                mlp = model.model.layers[layer].mlp
                mlp.up_proj.weight[j] = 3 * direction
                mlp.down_proj.weight[:, j] = 0.3 * direction
    made = build(model.eval(), tokenizer, samples=12, seeds=[0, 1, 2])
    return made, compare(made)


def test_planted_neurons_are_named_and_reproduce_the_claim(experiment):
    made, comparison = experiment
    assert {s.id for s in made.task.samples()} == {f"{i}.{j}" for i in (1, 2, 3) for j in range(4)}
    findings = made.findings(comparison)
    assert verdict(findings) == "reproduced", findings
    assert [f.outcome for f in findings] == ["holds"] * 3
    assert comparison.mean(METHOD, "effect") > 2 * comparison.mean(RANDOM, "effect")
    assert comparison.values(PLAIN, "effect").max() < 1e-4
    assert math.isnan(comparison.mean(PLAIN, "correlation")) and comparison.mean(METHOD, "correlation") > 0.5


@torch.no_grad()
def test_effects_are_those_of_clamp_effect(experiment, tokenizer):
    made, comparison = experiment
    sample = made.task.samples()[5]
    target = sample.data["target"]
    reading = clamp_effect(made.task.model, tokenizer, [PROMPTS[2]], (target.layer, target.neuron), [20.0, -20.0])
    high, low = (row["change"] for row in reading.rows)
    metrics = comparison.outcomes[METHOD, sample.id, 2].metrics
    assert metrics["effect"] == pytest.approx((abs(high) + abs(low)) / 2, rel=1e-3)
    assert metrics["slope"] == pytest.approx((high - low) / 2, rel=1e-3, abs=1e-4)


@torch.no_grad()
def test_the_first_order_is_the_derivative_of_the_last_logits_input(experiment):
    """Without the final norm the logits of the last layer move by exactly first_order."""
    made, comparison = experiment
    model, sample = made.task.model, next(s for s in made.task.samples() if s.data["target"].layer == 3)
    target = sample.data["target"]
    ids = made.task.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    written = []
    for value in (20.0, 0.0):
        handle = decoder_layers(model)[3].register_forward_hook(lambda m, a, out: written.append(out[0, -1]))
        with clamp_neurons(model, {3: {target.neuron: value}}, side="up"):
            model(ids)
        handle.remove()
    moved = float(model.lm_head.weight[target.token] @ (written[0] - written[1]))
    assert comparison.outcomes[METHOD, sample.id, 0].metrics["first_order"] == pytest.approx(moved, rel=1e-3, abs=1e-4)


def test_controls_keep_what_they_should(experiment):
    made, _ = experiment
    task, named = made.task, {(t.layer, t.neuron) for t in made.task.named}
    assert [s.role for s in made.arms] == ["plain", "control", "control", "method"]
    for sample in task.samples():
        target = sample.data["target"]
        chosen, other = task.random_neuron(sample, 1), task.other_token(sample, 1)
        assert (chosen.layer, chosen.token) == (target.layer, target.token)
        assert (chosen.layer, chosen.neuron) not in named and chosen == task.random_neuron(sample, 1)
        assert other[:2] == target[:2] and other.token != target.token
        assert other.token in {t.token for t in task.named if t.layer == target.layer}
    assert task.random_neuron(sample, 1) != task.random_neuron(sample, 2)


# --- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    from support.families import build as make

    path = tmp_path_factory.mktemp("model")
    make("llama").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def command(*args, verb=("read", "--method", "lm-head-neurons"), code=0, stdin=None):
    result = CliRunner().invoke(main, [*verb, *args], input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout if code == 0 else result.stderr


def test_read_on_the_command_line(folder, llama, tokenizer, tmp_path):
    path, trace_path = str(tmp_path / "map.safetensors"), str(tmp_path / "t.safetensors")
    model = ["--model", folder]
    assert json.loads(command("--save", path, "--json", *model, verb=("fit", "lm-head-neurons"))) == []
    assert NeuronMap.load(path).header["fingerprint"] == fingerprint(llama)
    found = json.loads(command("-o", "find=the", "-o", "layer=2", "--json", *model))
    assert [len(a["rows"]) for a in found] == [20, 20] and found[0]["title"] == "neurons for 'the'"
    again = json.loads(command("-o", "find=the,sea", "--artifact", path, "--json", *model))
    assert again[0] == found[0] and again[1]["title"] == "neurons for 'sea'"
    named = [*model, "-o", "min_prob=0.0033"]  # a vocabulary of 320
    (read,) = json.loads(command("the old lighthouse", "--artifact", path, "--json", *named))
    (piped,) = json.loads(command("-", "--artifact", path, "--json", *named, stdin="the old lighthouse"))
    assert read == piped and "".join(dict.fromkeys(r["token"] for r in read["rows"])).startswith("the")
    ids = tokenizer("the old lighthouse", return_tensors="pt").input_ids
    traced(load(folder).model, ids, tokenizer, neurons="all").save(trace_path)
    assert json.loads(command("--trace", trace_path, "--artifact", path, "--json", *named))[0] == read
    (overlap,) = json.loads(command("-o", f"overlap={path}", "--artifact", path, "--json", *model))
    assert [r["share"] for r in overlap["rows"]] == [1.0] * 4
    assert "neurons for 'the'" in command("-o", "find=the", "--artifact", path, *model)


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "nothing was asked; give a text or --trace or -o find or -o layer or -o overlap"),
        ([" "], "text is empty"),
        (["a", "--trace", "b"], "give one of them"),
        (["a", "--artifact", "/nowhere"], "cannot be read as a map"),
        (["--trace", "/nowhere"], "cannot be read as a trace"),
        (["-o", "overlap=/nowhere"], "cannot be read as a map"),
        (["-o", "find=keeper testament"], "is not one token here"),
        (["-o", "find=the", "-o", "find=sea"], "'find' is given twice"),
        (["a", "-o", "min_prob=2"], "min_prob='2' is not allowed"),
        (["a", "--artifact", "x", "-o", "side=gate"], "side would have no effect with --artifact"),
        (["-o", "layer=4"], "layer 4 does not exist"),
        (["-o", "layer=1", "-o", "side=left"], "one of up, gate, down"),
    ],
)
def test_the_command_line_refuses(folder, args, message):
    error = command(*args, "--model", folder, code=2).strip().splitlines()
    assert len(error) == 1 and message in error[0], error


def test_a_map_that_cannot_be_written_is_refused(folder):
    error = command("--save", "/nowhere/map", "--model", folder, verb=("fit", "lm-head-neurons"), code=2)
    assert len(error.strip().splitlines()) == 1 and "cannot be written" in error


def test_a_trace_of_another_model_is_refused(folder, make_model, tmp_path):
    path = tmp_path / "t.safetensors"
    traced(make_model("qwen2"), random_ids(), neurons=[0]).save(path)
    assert "another model" in command("--trace", str(path), "--model", folder, code=2)
