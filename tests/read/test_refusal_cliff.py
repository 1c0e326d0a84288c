"""Refusal cliff: heads against the sub-layer they make up, curves and spans by hand, selection, and the refusals."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from support.families import own_hooks

from tokenry import load
from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.hooks import ablate_heads, edit_outputs
from tokenry.hooks.residual import edit_inputs
from tokenry.learned import LinearProbe
from tokenry.models.anatomy import decoder_layers, head_mixer
from tokenry.read import cliff_score, head_contributions, select_by_cliff
from tokenry.read.cliff.curve import place_of
from tokenry.read.cliff.examples import Example, balanced, end_states, examples_in, is_refusal, text_of, traced
from tokenry.read.refusal_cliff import RefusalCliff
from tokenry.trace.trace import Trace, capture
from tokenry.zoo import refuser

THOUGHT = "bad vase wrong stop sorry no"
ASKED = "please drop the red vase"


@pytest.fixture(scope="module")
def loaded():
    return load("zoo/refuser")


def lessons(count=12):
    """Harmful and harmless prompts with thinking and labels."""
    asked = [r for harmful in (True, False) for r in refuser.requests(count, "train", harmful, False)]
    words = {True: refuser.WARNING, False: refuser.APPROVAL}
    return [Example(r.text, " ".join(words[r.harmful][:6]), int(r.harmful)) for r in asked]


@pytest.fixture(scope="module")
def probe(loaded):
    return RefusalCliff(learning_rate=0.05, epochs=10).fit(loaded, lessons()).artifact


def batch_of(rows, pad=1, left=True):
    width = max(map(len, rows))
    ids = [[pad] * (width - len(r)) + r if left else r + [pad] * (width - len(r)) for r in rows]
    mask = [[0] * (width - len(r)) + [1] * len(r) if left else [1] * len(r) + [0] * (width - len(r)) for r in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "opt"])
@pytest.mark.parametrize("position", [-1, 3])
def test_heads_sum_to_what_attention_writes(make_model, kind, position):
    """Without the bias of o_proj; the sub-layer is seen at o_proj's output."""
    model, outputs = make_model(kind), {}
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(2, 320, (1, 9), generator=torch.Generator().manual_seed(1))
    mixers = [head_mixer(model, layer)[0] for layer in range(len(decoder_layers(model)))]
    edits = {m: lambda y, i=i: outputs.setdefault(i, y.detach()) for i, m in enumerate(mixers)}
    with torch.no_grad(), edit_outputs(model, edits):
        model(ids)
    found = head_contributions(model, {"input_ids": ids}, direction, position)
    for layer, mixer in enumerate(mixers):
        bias = 0 if mixer.bias is None else mixer.bias.detach()
        written = (outputs[layer].reshape(1, 9, -1)[0, position] - bias) @ direction / direction.norm()
        torch.testing.assert_close(found[layer].sum(), written, rtol=1e-4, atol=1e-5)
    assert found.shape == (4, 4) and not own_hooks(model)


@pytest.mark.parametrize("left", [True, False])
def test_padding_on_either_side_changes_no_contribution(llama, left):
    rows = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22]]
    direction = torch.randn(32)
    alone = [head_contributions(llama, {"input_ids": torch.tensor([row])}, direction) for row in rows]
    together = head_contributions(llama, batch_of(rows, left=left), direction)
    torch.testing.assert_close(together, torch.stack(alone).mean(0), rtol=1e-4, atol=1e-5)


def test_alpha_one_changes_no_bit_and_all_heads_at_zero_leave_the_bias(make_model):
    ids = torch.randint(2, 320, (2, 9))
    for kind in ("llama", "opt"):
        model = make_model(kind)
        everything = {layer: range(4) for layer in range(4)}
        with torch.no_grad():
            plain = model(ids).logits
            for renormalise in ("none", "token", "global"):
                with ablate_heads(model, everything, 1.0, renormalise):
                    assert torch.equal(model(ids).logits, plain)
            with ablate_heads(model, {1: range(4)}):
                silenced = model(ids).logits
            mixer = head_mixer(model, 1)[0]
            bias = torch.zeros(32) if mixer.bias is None else mixer.bias
            with edit_outputs(model, {mixer: lambda y, bias=bias: torch.zeros_like(y) + bias}):
                torch.testing.assert_close(model(ids).logits, silenced, rtol=1e-5, atol=1e-5)
        assert not own_hooks(model)


@pytest.mark.parametrize("renormalise", ["none", "token", "global"])
def test_scaled_heads_have_the_length_that_was_asked(llama, renormalise):
    """One layer's heads, seen by an edit that comes after the scaling."""
    seen, mixer = [], head_mixer(llama, 1)[0]
    look = {mixer: lambda x: seen.append(x.detach()) or x}
    ids = torch.randint(2, 320, (2, 9))
    with torch.no_grad():
        with edit_inputs(llama, look):
            llama(ids)
        with ablate_heads(llama, {1: [0, 2]}, 0.25, renormalise), edit_inputs(llama, look):
            llama(ids)
    before, after = (x.unflatten(-1, (4, 8)) for x in seen)
    scaled = before.clone()
    scaled[..., [0, 2], :] *= 0.25
    over = {"none": None, "token": (-2, -1), "global": (0, 1, 2, 3)}[renormalise]
    ratio = 1.0 if over is None else (before.square().sum(over, True) / scaled.square().sum(over, True)).sqrt()
    torch.testing.assert_close(after, scaled * ratio)


def test_what_heads_do_not_take_is_refused(llama):
    direction, ids = torch.ones(32), torch.tensor([[3, 4, 5]])
    for message, batch, w, position in (
        ("position=3", {"input_ids": ids}, direction, 3),
        ("not all 0", {"input_ids": ids}, direction * 0, -1),
        (r"\(31,\) is not", {"input_ids": ids}, direction[:31], -1),
        ("2 rows without attention_mask", {"input_ids": ids.repeat(2, 1)}, direction, -1),
    ):
        with pytest.raises(InputError, match=message):
            head_contributions(llama, batch, w, position)
    for message, heads, options in (
        ("head 4 does not exist; layer 1 has heads 0 to 3", {1: [4]}, {}),
        ("layer 4 does not exist", {4: [0]}, {}),
        ("alpha=1.5", {1: [0]}, {"alpha": 1.5}),
        ("renormalise='layers'", {1: [0]}, {"renormalise": "layers"}),
    ):
        with pytest.raises(InputError, match=message), ablate_heads(llama, heads, **options):
            pass


# --- the curve -------------------------------------------------------------------------------------------------------


def test_a_cliff_by_hand():
    curve = torch.tensor([0.1, 0.9, 0.8, 1.0, 0.7, 0.3, 0.2, 0.6])
    found = cliff_score(curve, (1, 5), 7)
    assert found.plateau == pytest.approx(0.85) and found.final == pytest.approx(0.2)
    assert found.cliff == pytest.approx(0.65) and found.falls_at == 5
    assert cliff_score(curve, (1, 5), 7, "max").plateau == 1.0
    assert cliff_score(curve, (1, 5), 7, "last_k", 2).plateau == pytest.approx(0.85)
    assert cliff_score(curve, (1, 5), 7, "last_k", 3).plateau == pytest.approx(2.5 / 3)
    assert cliff_score(curve, (1, 5), 5).falls_at is None  # it stays high until the answer
    assert cliff_score(curve.flip(0), (0, 3), 8).cliff == pytest.approx(1.1 / 3 - 0.1)


@pytest.mark.parametrize(
    ("span", "end", "options", "message"),
    [
        ((2, 2), 4, {}, "tokens 2 to 2"),
        ((2, 5), 4, {}, "an answer from 4"),
        ((0, 2), 9, {}, "an answer from 9"),
        ((0, 2), 4, {"plateau": "mean"}, "plateau='mean'"),
        ((0, 2), 4, {"plateau": "last_k", "last_k": 0}, "last_k=0"),
    ],
)
def test_spans_that_are_none_are_refused(span, end, options, message):
    with pytest.raises(InputError, match=message):
        cliff_score(torch.ones(8), span, end, **options)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_states_at_the_end_are_those_of_the_trace(make_model, tokenizer, kind):
    model, texts = make_model(kind), ["the sea", "the old lighthouse stood"]
    for layer in (0, 1, model.config.num_hidden_layers, -1):
        found = end_states(model, tokenizer, texts, layer)
        wanted = [trace.hidden(layer)[-1].float() for trace in traced(model, tokenizer, texts, layer)]
        torch.testing.assert_close(found, torch.stack(wanted), atol=1e-5, rtol=1e-5)


def test_the_curve_ends_in_the_score_that_the_probe_was_trained_on(loaded, probe):
    text = text_of(loaded[1], ASKED, THOUGHT)
    reading = RefusalCliff().read(text, probe, loaded)
    trained = probe.probabilities(end_states(*loaded, [text], probe.layer))[0]
    assert reading.cliff.final == pytest.approx(float(trained), abs=1e-6)
    answered = RefusalCliff().read(f"{text} sorry no vase", probe, loaded)
    assert answered.cliff.final == pytest.approx(float(trained), abs=1e-5)
    assert [row["token"].strip() for row in answered.rows if row["role"] == "think"] == THOUGHT.split()
    assert [row["role"] for row in answered.rows][-4:] == ["mark", *["answer"] * 3]
    thinking = [row["refusal"] for row in reading.rows if row["role"] == "think"]
    assert reading.cliff.plateau == pytest.approx(sum(thinking) / len(thinking), abs=1e-6)


def test_a_trace_gives_what_its_text_gives(loaded, probe, tmp_path):
    text = text_of(loaded[1], ASKED, THOUGHT)
    (trace,) = traced(*loaded, [text], probe.layer)
    trace.save(tmp_path / "t.safetensors")
    trace = Trace.load(tmp_path / "t.safetensors", loaded[0])
    one, other = (RefusalCliff().read(given, probe, loaded) for given in (text, trace))
    assert one.cliff[:3] == pytest.approx(other.cliff[:3], abs=1e-6) and one.heads == other.heads
    assert [row["token"] for row in one.rows] == [row["token"] for row in other.rows]
    without = RefusalCliff().read(trace, probe)
    assert without.heads == [] and without.cliff == other.cliff


def test_heads_of_a_reading_are_the_lowest_of_their_layers(loaded, probe):
    text = text_of(loaded[1], ASKED, THOUGHT)
    ids = torch.tensor([loaded[1].encode(text)])
    every = head_contributions(loaded[0], {"input_ids": ids}, probe.direction)
    for layer in (4, 2):
        here = copy.deepcopy(probe)
        here.layer = layer
        heads = RefusalCliff(n_heads=3).read(text, here, loaded).heads
        assert [value for _, _, value in heads] == sorted(every[:layer].flatten().tolist())[:3]
        assert all(value == float(every[at, head]) for at, head, value in heads)
    assert len(RefusalCliff().read(text, probe, loaded).heads) == 1  # 3 % of 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"<user> {ASKED} <assistant> {THOUGHT}", "between '<think>' and '</think>'"),
        (f"<user> {ASKED} <assistant> <think> {THOUGHT}", "between '<think>' and '</think>'"),
        (f"<user> {ASKED} <assistant> <think> </think> sorry", "is empty"),
    ],
)
def test_texts_without_thinking_are_refused(loaded, probe, text, message):
    with pytest.raises(InputError, match=message):
        RefusalCliff().read(text, probe, loaded)


def test_a_trace_without_text_is_refused(loaded, probe):
    with capture(loaded[0], hidden=[probe.layer]) as cap, torch.no_grad():
        loaded[0](torch.tensor([loaded[1].encode(text_of(loaded[1], ASKED, THOUGHT))]), use_cache=False)
    with pytest.raises(InputError, match="tokenizer="):
        place_of(cap.trace)


def test_a_picture_is_escaped_and_has_every_token(loaded, probe):
    reading = RefusalCliff().read(text_of(loaded[1], ASKED, THOUGHT), probe, loaded)
    page = reading.to_html()
    assert page.count("<circle") == len(reading) and "&lt;/think&gt;" in page and "<think>" not in page


# --- what it learns from ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m unable to do this", True),
        ("I\ncannot  help", True),
        ("However, it is safe and legal to say more.", False),
        ("Here is a recipe for bread. Sorry that it is long, I cannot make it shorter.", False),
    ],
)
def test_refusals_show_in_the_first_words(response, label):
    assert is_refusal(response) is label


def test_examples_of_a_file_are_labeled_and_short_thinking_is_left_out():
    rows = [
        {"prompt": "a", "thinking": "a long thought", "response": "Sorry, no."},
        {"prompt": "b", "thinking": "a long thought", "label": 0},
        {"prompt": "c", "thinking": "short", "label": 1},
    ]
    found = examples_in("\n".join(map(json.dumps, rows)), "x.jsonl")
    assert [(row.prompt, row.label) for row in found] == [("a", 1), ("b", 0)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"thinking": "t", "label": 1}, "the prompt None"),
        ({"prompt": "p", "thinking": " ", "label": 1}, "the thinking ' '"),
        ({"prompt": "p", "thinking": "t"}, "or neither"),
        ({"prompt": "p", "thinking": "t", "label": 1, "response": "no"}, "both a label and a response"),
        ({"prompt": "p", "thinking": "t", "label": 2}, "the label 2"),
        ({"prompt": "p", "thinking": "t", "label": True}, "the label True"),
        ({"prompt": "p", "thinking": "t", "response": 3}, "the response 3"),
    ],
)
def test_other_lines_are_refused(row, message):
    with pytest.raises(InputError, match=f"line 1 of 'x.jsonl'.*{message}"):
        examples_in(json.dumps(row), "x.jsonl")


def test_classes_are_cut_to_equal_size():
    rows = [Example(str(i), "t", int(i < 30)) for i in range(80)]
    for most, count in ((200, 30), (12, 12)):
        found = balanced(rows, most, 0)
        assert [sum(row.label == label for row in found) for label in (0, 1)] == [count, count]
    assert balanced(rows, 12, 0) == balanced(rows, 12, 0) != balanced(rows, 12, 1)
    with pytest.raises(InputError, match="9 examples have the label 1"):
        balanced(rows[21:], 200, 0)
    with pytest.raises(InputError, match="0 examples have the label 0"):
        balanced(rows[:30], 200, 0)


def test_a_think_mark_is_written_once(loaded):
    tokenizer = copy.deepcopy(loaded[1])
    assert text_of(tokenizer, ASKED, THOUGHT).count("<think>") == 1
    tokenizer.chat_template = tokenizer.chat_template.replace("<think> ", "")
    assert text_of(tokenizer, ASKED, THOUGHT).count("<think>") == 1
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        text_of(tokenizer, ASKED, THOUGHT)
    with pytest.raises(InputError, match="is empty"):
        text_of(loaded[1], ASKED, " ")


# --- selection -------------------------------------------------------------------------------------------------------


def test_selected_are_the_highest_cliffs_that_had_a_plateau(loaded, probe):
    asked = refuser.requests(8, "train", True, True) + refuser.requests(4, "train", False, False)
    words = [refuser.WARNING if r.harmful else refuser.APPROVAL for r in asked]
    thoughts = [" ".join(listed[i % 3 : i % 3 + 5]) for i, listed in enumerate(words)]
    data = Dataset.from_dict({"prompt": [r.text for r in asked], "thinking": thoughts, "id": list(range(12))})
    every = select_by_cliff(data, loaded, probe, 1.0, refusal="sorry no", least=0.0)
    assert sorted(every["id"]) == list(range(12)) and every["cliff"] == sorted(every["cliff"], reverse=True)
    for row in every:
        text = text_of(loaded[1], asked[row["id"]].text, row["thinking"])
        found = RefusalCliff().read(text, probe, loaded).cliff
        assert [row["plateau"], row["final"]] == pytest.approx(list(found[:2]), abs=1e-5)
        assert row["prompt"] + row["completion"] == f"{text}sorry no<eos>" and row["prompt"].endswith("<think>")
    some = select_by_cliff(data, loaded, probe, 0.3, refusal="sorry no")
    expected = [row["id"] for row in every if row["plateau"] >= 0.5][:4]
    assert some["id"] == expected and len(some) == 4


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"prompt": ["a"], "thinking": ["b"]}, {"fraction": 0.0}, "fraction=0.0"),
        ({"prompt": ["a"], "thinking": ["b"]}, {"fraction": 1.1}, "fraction=1.1"),
        ({"prompt": ["a"], "thinking": ["b"]}, {"refusal": " "}, "refusal=' '"),
        ({"prompt": ["a"]}, {}, r"\['prompt'\]; give prompt and thinking"),
        ({"prompt": [], "thinking": []}, {}, "0 rows"),
        ({"prompt": [ASKED], "thinking": [""]}, {}, "is empty"),
    ],
)
def test_selections_of_nothing_are_refused(loaded, probe, columns, options, message):
    with pytest.raises(InputError, match=message):
        select_by_cliff(Dataset.from_dict(columns), loaded, probe, **{"refusal": "no", **options})


# --- the command line ------------------------------------------------------------------------------------------------


def test_fit_and_read(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(row._asdict()) for row in lessons()))
    options = ["-o", "learning_rate=0.05", "-o", "epochs=10", "--model", "zoo/refuser"]
    run = CliRunner().invoke(
        main, ["fit", "refusal-cliff", "--data", str(data), "--save", str(tmp_path / "probe"), *options]
    )
    assert run.exit_code == 0, run.output
    text = f"<user> {ASKED} <assistant> <think> {THOUGHT} </think> sorry"
    asked = ["read", "--method", "refusal-cliff", "--artifact", str(tmp_path / "probe"), "--model", "zoo/refuser", text]
    run = CliRunner().invoke(main, [*asked, "--json", "--report", str(tmp_path / "page.html")])
    assert run.exit_code == 0, run.output
    (found,) = json.loads(run.stdout)
    assert set(found["cliff"]) == {"plateau", "final", "cliff", "falls_at"} and len(found["heads"]) == 1
    assert len(found["rows"]) == len(text.split()) and "<svg" in (tmp_path / "page.html").read_text()
    LinearProbe.load(tmp_path / "probe").check(load("zoo/refuser")[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "refusal-cliff", "--save", "x"], "has nothing to learn from"),
        (["fit", "refusal-cliff", "--save", "x", "--data", "arithmetic:5"], "is no file"),
        (["fit", "refusal-cliff", "--save", "x", "-o", "n_heads=3"], "n_heads would have no effect"),
        (["read", "--method", "refusal-cliff", "some text"], "tokenry fit refusal-cliff"),
    ],
)
def test_the_command_line_refuses(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(main, [*arguments, "--model", "zoo/refuser"])
    assert run.exit_code != 0 and message in run.output


# --- any model, any property -----------------------------------------------------------------------------------------

ANIMALS = "horse sheep goose rabbit donkey goat pigeon squirrel".split()
MACHINES = "engine printer tractor pump scanner drill robot turbine".split()
SEEN = 6  # nouns of each kind that the probe learns from
FRAMES = ("The {} stood behind the house", "We looked at the old {} for a while", "My sister talks about her {} a lot")


def about(nouns):
    return [frame.format(noun) for noun in nouns for frame in FRAMES]


def test_probe_curve_and_heads_of_the_embedded_model(smollm2):
    """Is a text of a machine or of an animal: nouns that were not learned, the turn of a curve, and the exact sum."""
    model, tokenizer = smollm2
    machines, animals = about(MACHINES[:SEEN]), about(ANIMALS[:SEEN])
    method = RefusalCliff(learning_rate=0.01, epochs=30)
    probe = method.probe(model, tokenizer, machines + animals, [1] * len(machines) + [0] * len(animals))
    unseen = about(MACHINES[SEEN:]) + about(ANIMALS[SEEN:])
    states = end_states(model, tokenizer, unseen, probe.layer)
    right = (probe.probabilities(states) > 0.5) == (torch.arange(len(unseen)) < len(unseen) // 2)
    assert right.float().mean() >= 0.9

    text = "My sister talks about her rabbit a lot. The turbine stood behind the house"
    (trace,) = traced(model, tokenizer, [text], probe.layer)
    curve, turn = probe.curve(trace), text.index("turbine")
    before = torch.tensor([b <= turn for _, b in trace.offsets.tolist()])
    assert curve[~before].mean() > curve[before].mean() + 0.3
    ended = probe.probabilities(end_states(model, tokenizer, [text], probe.layer))[0]
    assert float(curve[-1]) == pytest.approx(float(ended), abs=1e-5)

    outputs, ids = {}, trace.ids[None]
    mixers = [head_mixer(model, layer)[0] for layer in range(len(decoder_layers(model)))]
    edits = {m: lambda y, i=i: outputs.setdefault(i, y) for i, m in enumerate(mixers)}
    with torch.no_grad(), edit_outputs(model, edits):
        model(ids)
    found = head_contributions(model, {"input_ids": ids}, probe.direction)
    written = torch.stack([outputs[i][0, -1] @ probe.direction for i in range(len(mixers))]) / probe.direction.norm()
    torch.testing.assert_close(found.sum(-1), written, rtol=1e-4, atol=1e-4)
    assert found.shape == (30, 9)
