"""Training the filter: traces against a plain replay, the report by hand, what is learned, and the command line."""

import json

import pytest
import torch
from click.testing import CliRunner
from support.denoisers import MASK, Characters, sharp

from tokenry import load
from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.decode import collect_egp_traces
from tokenry.decode.denoising.loop import MaskedDiffusionModel
from tokenry.learned import ConfidenceFilter, TraceDataset, TraceWriter, read_traces
from tokenry.models.anatomy import fingerprint
from tokenry.models.masks import make_bidirectional
from tokenry.train import FilterTrainer, Learn2PDTraining, filter_report, train_filter
from tokenry.train.filters.loss import filter_loss
from tokenry.train.filters.trainer import split_traces
from tokenry.zoo.denoiser import build_tokenizer

PROMPTS = ["abc", "defgh", "ba", "ponm", "kkk", "abcdefg"]


# --- traces --------------------------------------------------------------------------------------------------------


def egp_by_hand(model, prompt, width, length):
    """The records (confidences, labels, masks) of one prompt."""

    def predict(window):
        ids = torch.tensor([prompt + window])
        p = model.logits(ids, torch.ones_like(ids, dtype=torch.bool))[0, len(prompt) :].softmax(-1).max(-1)
        return p.indices.tolist(), p.values.tolist()

    answer = [MASK] * width
    for start in range(0, width, length):
        while masks := [i for i in range(start, start + length) if answer[i] == MASK]:
            tokens, conf = predict(answer)
            best = max(masks, key=lambda i: (conf[i], -i))
            answer[best] = tokens[best]
    records, window = [], [MASK] * width
    for start in range(0, width, length):
        block, before = range(start, start + length), None
        while any(window[i] == MASK for i in block):
            tokens, conf = predict(window)
            right = [tokens[i] == answer[i] for i in block]
            records.append(([conf[i] for i in block], right, [window[i] == MASK for i in block]))
            now = [tokens[i] for i in block]
            for i, fits in zip(block, right):
                window[i] = answer[i] if now == before else tokens[i] if fits and window[i] == MASK else window[i]
            before = now
    return records


@pytest.mark.parametrize("batch_size", [1, 4])
def test_traces_equal_a_replay(batch_size):
    model, tokenizer = MaskedDiffusionModel(sharp()), Characters()
    done = []
    traces = collect_egp_traces(
        model,
        tokenizer,
        PROMPTS,
        gen_length=12,
        block_length=6,
        batch_size=batch_size,
        progress=lambda *counts: done.append(counts),
    )
    assert done[-1] == (6, 6) and traces.conf.dtype == torch.float32 and traces.conf.shape[1] == 6
    for number, prompt in enumerate(PROMPTS):
        conf, label, mask = zip(*egp_by_hand(model, [ord(c) - ord("a") for c in prompt], 12, 6))
        found = traces.take(traces.prompt_id == number)
        assert found.label.tolist() == list(label) and found.mask.tolist() == list(mask)
        assert torch.allclose(found.conf, torch.tensor(conf), atol=1e-5)
        assert not found.label.all() and found.mask[0].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.5}, "temperature=0.5 is not allowed; traces are collected at temperature 0"),
        ({"gen_length": 9}, "gen_length=9 is not a multiple of block_length=6"),
        ({"gen_length": 3}, "gen_length=3 is not a multiple of block_length=6"),
        ({"prompts": []}, "no prompts"),
    ],
)
def test_collecting_refuses(change, message):
    options = {"prompts": PROMPTS, "gen_length": 12, "block_length": 6, **change}
    with pytest.raises(InputError, match=message):
        collect_egp_traces(sharp(), Characters(), **options)


# --- loss and report -----------------------------------------------------------------------------------------------


def made_up(rule, records=400, length=4, prompts=40, committed=0.3):
    """Random confidences whose labels follow a rule."""
    generator = torch.Generator().manual_seed(0)
    conf = torch.rand(records, length, generator=generator)
    mask = torch.rand(records, length, generator=generator) > committed
    return TraceDataset(conf, rule(conf), mask, torch.arange(records) % prompts)


def identity(length, scale=1.0):
    """Logits that are the confidences times a scale."""
    made = ConfidenceFilter(length)
    with torch.no_grad():
        for layer in (made.layers[0], made.layers[2]):
            layer.weight.copy_(torch.eye(length))
            layer.bias.zero_()
        made.layers[2].weight.mul_(scale)
    return made


def test_the_loss_by_hand():
    conf, label = torch.tensor([[0.2, 0.9]]), torch.tensor([[True, False]])
    mask = torch.tensor([[True, False]])
    traces = TraceDataset(conf, label, mask, torch.tensor([0]))
    first = -torch.tensor(0.2).sigmoid().log().item()
    second = -(1 - torch.tensor(0.9).sigmoid()).log().item()
    assert filter_loss(identity(2), traces).item() == pytest.approx((first + second) / 2)
    assert filter_loss(identity(2), traces, mask_loss=True).item() == pytest.approx(first)


def test_the_report_by_hand():
    """Logits 0, 1, 2, 3, 4 and a committed position: probabilities .5, .731, .881, .953, .982."""
    conf = torch.tensor([[0.0, 0.1, 0.2, 0.3, 0.4, 1.0]])
    label = torch.tensor([[False, True, False, True, True, False]])
    mask = torch.tensor([[True] * 5 + [False]])
    report = filter_report(identity(6, 10.0), TraceDataset(conf, label, mask, torch.tensor([0])), 0.7)
    assert report["accepted"] == 4 / 5 and report["false_positives"] == 1 / 4 and report["false_negatives"] == 0
    p = (conf[0, :5] * 10).sigmoid().tolist()
    gaps = [p[0], abs(p[1] - 1), p[2], abs(p[3] + p[4] - 2)]
    assert report["calibration"] == pytest.approx(sum(gaps) / 5, abs=1e-6)
    strict = filter_report(identity(6, 10.0), TraceDataset(conf, label, mask, torch.tensor([0])), 0.99)
    assert strict["false_positives"] == 0 and strict["false_negatives"] == 1 and strict["accepted"] == 0


def test_prompts_are_in_one_part_only():
    traces = made_up(lambda conf: conf > 0.5, records=200, prompts=40)
    parts = split_traces(traces)
    prompts = [set(part.prompt_id.tolist()) for part in parts]
    assert [len(p) for p in prompts] == [32, 4, 4] and len(set.union(*prompts)) == 40
    assert sum(len(part.conf) for part in parts) == 200
    steps = split_traces(traces, "step")
    assert [len(part.conf) for part in steps] == [160, 20, 20]
    assert set(steps[0].prompt_id.tolist()) & set(steps[2].prompt_id.tolist())
    assert not torch.equal(split_traces(traces, seed=1)[1].prompt_id, parts[1].prompt_id)


# --- training ------------------------------------------------------------------------------------------------------

FAST = {"lr": 0.02, "epochs": 800, "hidden": 16}


def test_a_threshold_is_learnt():
    made, report = train_filter(made_up(lambda conf: conf > 0.6), accept_threshold=0.9, **FAST)
    assert report["loss"] < 0.12 and report["false_positives"] < 0.02 and report["false_negatives"] < 0.25
    assert not made.training


def test_context_is_learnt():
    """Final is what its left neighbor is sure of: a position's own confidence says nothing."""
    traces = made_up(lambda conf: conf.roll(1, 1) > 0.5)
    _, report = train_filter(traces, accept_threshold=0.8, **FAST)
    assert report["false_positives"] < 0.1 and report["false_negatives"] < 0.3


def test_training_is_repeatable_and_keeps_the_best():
    traces = made_up(lambda conf: (conf > 0.5) ^ (torch.rand(conf.shape, generator=torch.Generator()) < 0.2))
    trainers = [FilterTrainer(traces, epochs=600, seed=3) for _ in range(2)]
    before = trainers[0]._validation_loss()
    outputs = [trainer.train() for trainer in trainers]
    assert outputs[0].training_loss == outputs[1].training_loss < before
    for a, b in zip(*(trainer.filter.parameters() for trainer in trainers)):
        assert torch.equal(a, b)
    assert trainers[0]._validation_loss() == outputs[0].training_loss
    other = FilterTrainer(traces, epochs=600, seed=4)
    assert not torch.equal(other.filter.layers[0].weight, FilterTrainer(traces, seed=3).filter.layers[0].weight)


def test_training_stops_when_validation_does():
    """Labels that no confidence tells: validation soon gets worse."""
    traces = made_up(lambda conf: torch.rand(conf.shape, generator=torch.Generator().manual_seed(1)) < 0.7)
    trainer, seen = FilterTrainer(traces, epochs=5000, hidden=64, progress=lambda *counts: seen.append(counts)), []
    trainer.train()
    assert trainer.state.global_step < 5000 and seen[-1][0] == trainer.state.global_step
    assert trainer.filter.hidden == 64


def test_mask_loss_ignores_what_is_committed():
    """Committed positions have the opposite label; only with them the filter is confused."""
    plain = made_up(lambda conf: conf > 0.5, committed=0.6)
    traces = plain._replace(label=plain.label ^ ~plain.mask)
    reports = [train_filter(traces, mask_loss=on, accept_threshold=0.8, **FAST)[1] for on in (True, False)]
    assert reports[0]["false_negatives"] < 0.2 < 0.5 < reports[1]["false_negatives"]


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda t: t.take(torch.arange(0)), {}, "there are 0 traces; collect at least 50"),
        (lambda t: t.take(torch.arange(49)), {}, "there are 49 traces"),
        (lambda t: t._replace(label=t.label | True), {}, "all predictions are final, so there is nothing to tell"),
        (lambda t: t._replace(label=t.label & False), {}, "all predictions are not final"),
        (lambda t: t._replace(label=t.label | t.mask), {"mask_loss": True}, "all predictions are final"),
        (lambda t: t._replace(conf=t.conf * 2), {}, r"confidences outside \[0, 1\]"),
        (lambda t: t._replace(conf=t.conf * float("nan")), {}, r"confidences outside \[0, 1\]"),
        (lambda t: t._replace(prompt_id=t.prompt_id % 2), {}, "of 2 prompts and cannot be split in three"),
        (lambda t: t, {"split_by": "row"}, "split_by='row' is unknown"),
        (lambda t: t, {"epochs": 0}, "epochs=0"),
        (lambda t: t, {"lr": 0.0}, "lr=0.0"),
        (lambda t: t, {"hidden": 0}, "hidden=0"),
    ],
)
def test_training_refuses(change, options, message):
    with pytest.raises(InputError, match=message):
        train_filter(change(made_up(lambda conf: conf > 0.5)), **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_length": 24}, "learn2pd has no option 'block_length'"),
        ({"accept_threshold": 1}, "accept_threshold=1 is not allowed"),
        ({"split_by": "row"}, "split_by='row' is not allowed"),
    ],
)
def test_options_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        Learn2PDTraining(**values)


# --- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random denoiser with the tokenizer of the puzzles."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer, path = build_tokenizer(), tmp_path_factory.mktemp("denoiser")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id", "mask_token_id")}
    model = make_bidirectional(LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else None
        model.lm_head.weight.mul_(3.0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tokenry(*args, code=0):
    result = CliRunner().invoke(main, list(map(str, args)))
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.output


def saved(folder, path, prompts=40, width=16, *further):
    """A file of traces, and what the command line says of it."""
    (path.parent / "prompts.txt").write_text("\n".join(f"sort {n}=" for n in range(1000, 1000 + prompts)))
    command = ["decode", "--method", "learn2pd", "--model", folder, "--prompts", path.parent / "prompts.txt"]
    return tokenry(*command, "-o", "block_length=8", "--max-new-tokens", width, "--save-traces", path, *further)


def test_the_command_line_traces_trains_and_decodes(folder, tmp_path):
    data, out = tmp_path / "traces.safetensors", tmp_path / "filter"
    told = json.loads(saved(folder, data, 40, 16, "--json"))
    assert told["prompts"] == 40 and told["traces"] > 80 and told["output"] == str(data)
    command = ["train", "--method", "learn2pd", "--model", folder, "--data", data, "--output", out, "-o", "epochs=300"]
    summary = json.loads(tokenry(*command, "--json"))
    assert summary["prompts"] == 36 and summary["held_out"] == 4 and summary["steps"] <= 300
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert set(summary["after"]) == set(Learn2PDTraining.measures)
    assert ConfidenceFilter.load(out).block_length == 8
    assert "exists and is not an empty folder" in tokenry(*command, code=2)
    decode = ["decode", "--method", "learn2pd", "--model", folder, "-o", f"filter={out}", "--max-new-tokens", 16]
    found = json.loads(tokenry(*decode, "--greedy", "--json", "sort 940271="))
    assert 0 < found["forward_calls"] <= 16 and len(found["ids"]) <= 16
    assert tokenry(*decode, "--greedy", "sort 940271=").strip().endswith(found["text"].strip())
    assert "trained at temperature 0" in tokenry(*decode, "sort 940271=", code=2)


def test_the_command_line_shows_what_it_learnt(folder, tmp_path):
    data, out = tmp_path / "traces.safetensors", tmp_path / "filter"
    text = saved(folder, data, 30, 8)
    assert "traces of 30 prompts" in text
    assert f"tokenry train --method learn2pd --model {folder} --data {data} --output FOLDER" in text
    options = ["-o", "epochs=40", "--hold-out", "0"]
    text = tokenry("train", "--method", "learn2pd", "--model", folder, "--data", data, "--output", out, *options)
    assert "30 prompts, 40 steps" in text and "at training prompts:" in text
    assert f"tokenry decode --method learn2pd -o filter={out} --model {folder} --greedy PROMPT" in text


# --- files ---------------------------------------------------------------------------------------------------------


def test_saved_traces_are_those_that_are_collected(folder, tmp_path):
    """Bit for bit, batch by batch, with the prompts numbered on."""
    saved(folder, tmp_path / "traces", 10, 16, "--batch-size", 4)
    model, tokenizer = load(str(folder))
    prompts = [f"sort {n}=" for n in range(1000, 1010)]
    expected = collect_egp_traces(model, tokenizer, prompts, gen_length=16, block_length=8, batch_size=4)
    found, header = read_traces(tmp_path / "traces")
    assert all(torch.equal(*values) for values in zip(found, expected)) and found.conf.dtype == torch.float32
    assert header.fingerprint == fingerprint(model)
    read = Learn2PDTraining().read(tmp_path / "traces", tokenizer)
    for one in read:
        number = int(one.traces.prompt_id[0])
        mine = expected.take(expected.prompt_id == number)
        assert all(torch.equal(*values) for values in zip(one.traces, mine))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, InputError])
def test_what_was_traced_survives_an_interruption(stop, tmp_path):
    traces = made_up(lambda conf: conf > 0.5, records=20, prompts=5)
    with pytest.raises(stop), TraceWriter(tmp_path / "traces", sharp()) as writer:
        writer.add(traces)
        writer.add(traces)
        raise stop
    found, _ = read_traces(tmp_path / "traces")
    assert len(found.conf) == 40 and found.prompt_id.unique().tolist() == list(range(10))
    with pytest.raises(stop), TraceWriter(tmp_path / "traces", sharp()):
        raise stop
    assert len(read_traces(tmp_path / "traces")[0].conf) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["traces"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t._replace(conf=t.conf[:, :0]), "there is nothing in it"),
        (lambda t: t._replace(conf=t.conf.long()), "'conf' is of the type torch.int64, not of floating point"),
        (lambda t: t._replace(label=t.label[:7]), "'label' has the shape"),
        (lambda t: t._replace(mask=t.mask.float()), "'mask' is of the type torch.float32, not of true and false"),
        (lambda t: t._replace(prompt_id=t.prompt_id - 9), "'prompt_id' has values from -9"),
    ],
)
def test_damaged_traces_are_refused(change, message, tmp_path):
    with TraceWriter(tmp_path / "traces", sharp()) as writer:
        writer.add(change(made_up(lambda conf: conf > 0.5, records=20)))
    with pytest.raises(InputError, match=f"cannot be read as traces .*{message}.*--save-traces"):
        read_traces(tmp_path / "traces")


def test_prompts_are_not_traces(tmp_path):
    (tmp_path / "data").write_text('{"prompt": "a"}')
    with pytest.raises(InputError, match=r"cannot be read as traces .*; write one with `tokenry decode"):
        Learn2PDTraining().read(tmp_path / "data", None)


def test_traces_of_another_model_and_none_are_refused(tmp_path):
    with TraceWriter(tmp_path / "traces", sharp()) as writer:
        writer.add(made_up(lambda conf: conf > 0.5))
    read = Learn2PDTraining().read(tmp_path / "traces", None)
    Learn2PDTraining().trainer(sharp(), None, read, tmp_path)
    with pytest.raises(InputError, match=r"the traces are those of .*, not of the weights .*; trace this model with"):
        Learn2PDTraining().trainer(sharp(ends=3), None, read, tmp_path)
    with pytest.raises(InputError, match="no prompts to train on; trace more, or hold fewer out"):
        Learn2PDTraining().trainer(sharp(), None, [], tmp_path)


def test_the_order_of_prompts_is_drawn(tmp_path):
    with TraceWriter(tmp_path / "traces", sharp()) as writer:
        writer.add(made_up(lambda conf: conf > 0.5))
    orders = [
        [int(one.traces.prompt_id[0]) for one in Learn2PDTraining(seed=seed).read(tmp_path / "traces", None)]
        for seed in (0, 0, 1)
    ]
    first, again, other = orders
    assert first == again != other and sorted(first) == sorted(other) == list(range(40)) != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "antislop"], "no training reads traces of antislop; give --method learn2pd"),
        ([], "--save-traces is for one method, here are 0; give --method learn2pd"),
        (["--method", "learn2pd", "-o", "filter=x"], "learn2pd has no option 'filter'; its options are: block_length"),
        (["--method", "learn2pd", "--seed", "1"], "--seed would have no effect with --save-traces"),
        (["--method", "learn2pd", "--temperature", "0.5"], "--temperature would have no effect with --save-traces"),
        (["--method", "learn2pd", "--save-pairs", "p"], "--save-pairs would have no effect with --save-traces"),
        (["--method", "learn2pd", "--batch-size", "2"], "--batch-size would have no effect without --prompts"),
        (["--method", "creditdecoding", "--method", "learn2pd"], "no training reads traces of creditdecoding"),
    ],
)
def test_the_command_line_refuses_before_the_work(arguments, message, tmp_path):
    output = tokenry("decode", "a", "--model", "/nowhere", "--save-traces", tmp_path / "traces", *arguments, code=2)
    assert message in " ".join(output.split())


def test_files_of_others_stay(folder, tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("years of work")
    command = ["decode", "sort 12=", "--method", "learn2pd", "-o", "block_length=8", "--max-new-tokens", 8]
    command += ["--model", folder, "--save-traces", mine]
    assert "exists already" in tokenry(*command, code=2) and mine.read_text() == "years of work"
    assert "traces of 1 prompts" in tokenry(*command, "--force")
    before = mine.read_bytes()
    tokenry(*command)  # it is known as ours
    assert mine.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["mine"]
    wrong = ["-o", "block_length=16"]
    assert "gen_length=8 is not a multiple of block_length=16" in tokenry(*command[:4], *wrong, *command[6:], code=2)
    assert mine.read_bytes() == before


def test_what_train_reads_is_said(tmp_path):
    said = tokenry("train", "--method", "learn2pd", "--data", tmp_path / "no", "--output", tmp_path / "o", code=2)
    assert "give what `tokenry decode --method learn2pd --save-traces FILE` writes" in " ".join(said.split())
