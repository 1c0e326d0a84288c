"""Personalized code models: each way of tuning against its definition, what is stored, and the command."""

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.evidence import personalized_code as evidence
from tokenry.measure.compare import Comparison
from tokenry.measure.experiment import Experiment, Run
from tokenry.measure.task import Arm, Outcome
from tokenry.measure.tasks.project import CONTROL, PROJECT, ProjectTask, Tuned
from tokenry.train import PersonalizedCode, ProjectDelta, Tuning, load_delta, personalize, read_project, text_prefix
from tokenry.train.projects.evaluation import exact_lines, foretell, line_ends
from tokenry.train.projects.files import SourceFile, windows
from tokenry.train.projects.trainer import mean_loss
from tokenry.train.projects.ways import WAYS, report, trained, training_flops

SMALL = {"window": 32, "batch_size": 4, "max_epochs": 2, "num_virtual_tokens": 3, "rank": 2}


def fresh(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = {"vocab_size": 384, "num_hidden_layers": 3, "tie_word_embeddings": True, **shape, **changes}
    return LlamaForCausalLM(LlamaConfig(max_position_embeddings=256, **config)).eval()


def ids(*shape, seed=1):
    return torch.randint(2, 300, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "part").mkdir()
    for i in range(9):
        text = "".join(f"def name_{i}_{j}(value):\n    return value + {j}\n\n" for j in range(6))
        (folder / "part" / f"file_{i}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def files(project, tokenizer):
    return read_project(project, tokenizer)


# --- files ---------------------------------------------------------------------------------------------------------


def test_a_project_is_its_source_files_in_random_order(tmp_path, tokenizer):
    for name, content in {
        "a.py": b"x = 1\n",
        "b/c.rs": b"fn main() {}\r\n\tlet a = 1;\n",
        "copy.py": b"x = 1\n",
        ".git/d.py": b"hidden = 1\n",
        "e.txt": b"no source",
        "latin.py": b"# \xe9\n",
        "empty.py": b" \n",
        "large.py": b"#" * (10**6 + 1),
        "B.PY": b"y = 2\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    found = {file.name: tokenizer.decode(file.ids) for file in read_project(tmp_path, tokenizer)}
    assert found == {"a.py": "x = 1\n", "b/c.rs": "fn main() {}\n\tlet a = 1;\n", "B.PY": "y = 2\n"}
    orders = {tuple(file.name for file in read_project(tmp_path, tokenizer, seed)) for seed in range(8)}
    assert len(orders) > 1
    assert read_project(tmp_path, tokenizer, 3) == read_project(tmp_path, tokenizer, 3)


def test_windows_do_not_cross_files_and_hold_every_next_token(files):
    pieces = windows(files, 32)
    assert sum(map(len, pieces)) == sum(len(file.ids) - (len(file.ids) % 32 == 1) for file in files)
    assert pieces[0] == files[0].ids[:32] and all(2 <= len(piece) <= 32 for piece in pieces)


# --- what is trained -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["custom", "embeddings", "last_block", "lora"])
def test_nothing_changes_before_training(way):
    model, x = fresh(), ids(2, 9)
    with torch.no_grad():
        before = model(x).logits
        assert torch.equal(personalize(model, Tuning(way))(x).logits, before)


def test_the_weights_of_each_way_are_those_of_the_table():
    """Counts of SmolLM2-135M, which the paper's ways would train; the model has no memory here."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    counts = {}
    for way in ("custom", "embeddings", "last_block"):
        config = LlamaConfig(vocab_size=49152, num_hidden_layers=30, tie_word_embeddings=True, **shape)
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        found = report(personalize(model, Tuning(way)))
        counts[way] = found.trained
        assert found.weights == 134_515_008 and found.bytes == 4 * found.trained
    assert counts == {"custom": 134_515_008, "embeddings": 28_311_552, "last_block": 3_540_096}
    assert 200 * 30 * 2 * 192 == 2_304_000  # a prefix of 200 tokens, by the formula that is tested below


def test_a_prefix_has_keys_and_values_of_every_layer():
    wrapped = personalize(fresh(), Tuning("prefix", virtual_tokens=5))
    assert [tuple(w.shape) for w in trained(wrapped).values()] == [(5, 2 * 3 * 2 * 8)]


def test_untied_embeddings_and_learned_positions_are_trained_together():
    from transformers import GPT2Config, GPT2LMHeadModel

    names = set(trained(personalize(fresh(tie_word_embeddings=False), Tuning("embeddings"))))
    assert names == {"model.embed_tokens.weight", "lm_head.weight"}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2))
    assert set(trained(personalize(gpt2, Tuning("embeddings")))) == {"transformer.wte.weight", "transformer.wpe.weight"}


def test_a_prefix_of_a_text_is_that_text():
    model, before, x = fresh(), ids(1, 5, seed=3), ids(2, 7)
    with torch.no_grad():
        expected = model(torch.cat([before.expand(2, -1), x], 1)).logits[:, 5:]
        start = text_prefix(model, before[0].tolist())
        wrapped = personalize(model, Tuning("prefix", virtual_tokens=5), start).eval()
        found = wrapped(input_ids=x, attention_mask=torch.ones_like(x)).logits
        longer = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
        padded = wrapped(input_ids=x, attention_mask=longer).logits[1, 2:]
        alone = wrapped(input_ids=x[1:, 2:], attention_mask=longer[1:, 2:]).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert padded.shape == alone.shape


@pytest.mark.parametrize("way", WAYS)
def test_operations_are_those_that_torch_counts(way):
    """Attention comes on top, which is little at this length."""
    model = fresh(hidden_size=64, intermediate_size=256, vocab_size=512, num_hidden_layers=6)
    tuning, x = Tuning(way, virtual_tokens=2, rank=4), ids(2, 16)
    tuned = personalize(model, tuning)
    with FlopCounterMode(display=False) as counter:
        tuned(input_ids=x, attention_mask=torch.ones_like(x), labels=x).loss.backward()
    assert 1 <= counter.get_total_flops() / training_flops(tuned, tuning, x.numel()) < 1.12


def test_all_blocks_and_the_rest_are_all_weights():
    every = set(dict(fresh().named_parameters()))
    blocks = set(trained(personalize(fresh(), Tuning("last_block", last_n_blocks=3))))
    assert every - blocks == {"model.embed_tokens.weight", "model.norm.weight"}


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_training_lowers_the_loss_and_leaves_the_rest_as_it_was(way, files, tokenizer, tmp_path):
    model, fixed = fresh(), dict(fresh().model.named_parameters())
    method = PersonalizedCode(way=way, learning_rate=0.2 if way == "prefix" else 5e-3, **SMALL)
    held, kept = files[:2], files[2:]
    trainer = method.trainer(model, tokenizer, kept, tmp_path / "scratch", progress=lambda *_: None)
    before = method.score(trainer, held)
    assert before["loss"] == pytest.approx(mean_loss(foretell(fresh(), windows(held, 32), trainer.ends)), abs=1e-5)
    trainer.train()
    after = method.score(trainer, held)
    assert after["loss"] < before["loss"] - 0.05
    assert trainer.losses[0] > min(trainer.losses)
    mine = trained(trainer.model)
    for name, weight in trainer.model.named_parameters():
        plain = next((key for key in fixed if name.replace(".base_layer", "").endswith(key)), None)
        assert name in mine or torch.equal(weight, fixed[plain]), name

    method.save(trainer, tmp_path / "saved")
    x = ids(1, 12)
    again = load_delta(fresh(), tmp_path / "saved").eval()
    with torch.no_grad():
        given = {"input_ids": x, "attention_mask": torch.ones_like(x)}
        assert torch.equal(again(**given).logits, trainer.model.eval()(**given).logits)
        if way in ("prefix", "lora"):
            from peft import PeftModel

            theirs = PeftModel.from_pretrained(fresh(), tmp_path / "saved" / "adapter").eval()
            torch.testing.assert_close(theirs(**given).logits, again(**given).logits)
    costs = method.costs(trainer)
    assert costs["bytes"] == sum(w.numel() * 4 for w in mine.values()) and costs["flops"] > 0


def test_the_best_epoch_stays(files, tokenizer, tmp_path):
    """At this rate the first epoch helps and later ones do harm."""
    method = PersonalizedCode(way="custom", learning_rate=0.03, **{**SMALL, "max_epochs": 30}, patience=2)
    trainer = method.trainer(fresh(), tokenizer, files, tmp_path, progress=lambda *_: None)
    trainer.train()
    assert len(trainer.losses) < 31  # it stopped
    validation = windows(files[:1], 32)
    assert mean_loss(foretell(trainer.model, validation, trainer.ends)) == pytest.approx(min(trainer.losses), abs=1e-5)


def test_all_blocks_train_as_all_weights_do(files, tokenizer, tmp_path):
    found = []
    for way in ("custom", "last_block"):
        model = fresh()
        method = PersonalizedCode(way=way, last_n_blocks=3, learning_rate=1e-3, **{**SMALL, "max_epochs": 1})
        trainer = method.trainer(model, tokenizer, files, tmp_path, progress=lambda *_: None)
        if way == "last_block":  # and what is no block
            for weight in (model.model.norm.weight, model.model.embed_tokens.weight):
                weight.requires_grad_(True)
        trainer.train()
        found.append(model.state_dict())
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name])


# --- what is measured ----------------------------------------------------------------------------------------------


def test_lines_count_as_completed_where_greedy_writing_writes_them(tokenizer):
    model, ends = fresh(), line_ends(tokenizer, 384)
    newline = int(ends.nonzero()[0])
    assert "\n" in tokenizer.decode([newline])
    row = ids(1, 4)[0].tolist()
    with torch.no_grad():
        for _ in range(3):  # what the model itself writes is completed
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
    marks = torch.zeros(384, dtype=torch.bool)
    marks[[row[3], row[6]]] = True
    (found,) = foretell(model, [row], marks)
    inner = row[4] in (row[3], row[6]) or row[5] in (row[3], row[6])
    assert inner or (found.lines, found.exact) == (1, 1)
    logp = model(torch.tensor([row])).logits[0].detach().log_softmax(-1)
    assert found.nats == pytest.approx(-sum(float(logp[i, t]) for i, t in enumerate(row[1:])), rel=1e-5)
    assert found.tokens == 6


def test_lines_begin_behind_an_end_and_empty_ones_do_not_count():
    ends = torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.bool)
    right = torch.tensor([0, 1, 1, 1, 0, 1, 0, 1], dtype=torch.bool)
    assert exact_lines(right, ends) == [True, False]


# --- refusals ------------------------------------------------------------------------------------------------------


def test_projects_that_cannot_be_split_are_refused(tmp_path, tokenizer, files):
    with pytest.raises(InputError, match="there is no folder"):
        read_project(tmp_path / "none", tokenizer)
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("x = 1\n")
    with pytest.raises(InputError, match="has 1 source files"):
        read_project(tmp_path, tokenizer)
    method = PersonalizedCode(**SMALL)
    with pytest.raises(InputError, match="only one file"):
        method.trainer(fresh(), tokenizer, files[:1], tmp_path)
    with pytest.raises(InputError, match="windows of 128 tokens to learn from"):
        PersonalizedCode(**{**SMALL, "window": 128}).trainer(fresh(), tokenizer, files, tmp_path)


@pytest.mark.parametrize(
    ("tuning", "change", "message"),
    [
        (Tuning("last_block", last_n_blocks=4), {}, "1 to 3 blocks"),
        (Tuning("prefix"), {"checkpointing": True}, "gradient checkpointing"),
        (Tuning("custom"), {"quantized": True}, "use way=lora"),
    ],
)
def test_ways_that_a_model_cannot_be_tuned_in_are_refused(tuning, change, message):
    model = fresh()
    if "checkpointing" in change:
        model.gradient_checkpointing_enable()
    if "quantized" in change:
        model.model.norm.weight = torch.nn.Parameter(torch.ones(32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=message):
        personalize(model, tuning)


def test_sliding_windows_and_long_prefixes_are_refused(make_model, files, tokenizer, tmp_path):
    with pytest.raises(InputError, match="sliding window"):
        personalize(make_model("gemma3"), Tuning("prefix"))
    with pytest.raises(InputError, match="take 332 tokens, and this model reads 256"):
        PersonalizedCode(**{**SMALL, "way": "prefix", "num_virtual_tokens": 300}).trainer(
            fresh(), tokenizer, files, tmp_path
        )


def test_a_delta_is_bound_to_its_model(tmp_path):
    model = fresh()
    made_for = {"model": "mine", "fingerprint": "other"}
    ProjectDelta.of(personalize(model, Tuning("last_block")), Tuning("last_block"), made_for).save(tmp_path / "delta")
    with pytest.raises(InputError, match="was trained for 'mine'"):
        load_delta(fresh(), tmp_path / "delta")


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_compares_all_ways(project, tmp_path, tokenizer):
    fresh().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    small = [part for name, value in SMALL.items() for part in ("-o", f"{name}={value}")]
    args = ["train", "--method", "personalized-code", "--project", str(project), "--model", str(tmp_path / "model")]
    args += ["-o", "way=all", *small, "--control", str(project / "part"), "--hold-out", "0.3"]
    said = CliRunner().invoke(main, [*args, "--output", str(tmp_path / "out"), "--json"], catch_exceptions=False)
    found = json.loads(said.stdout)
    assert list(found) == list(WAYS)
    for way, answer in found.items():
        assert answer["after"]["loss"] <= answer["before"]["loss"] + 0.5 and answer["held_out"] == 3
        assert set(answer["control"]["before"]) == {"loss", "exact_match"}
        assert answer["output"] == str(tmp_path / "out" / way)
        load_delta(fresh(), answer["output"])
    assert len({answer["before"]["loss"] for answer in found.values()}) == 1
    shown = CliRunner().invoke(main, [*args, "--output", str(tmp_path / "again")], catch_exceptions=False)
    lines = shown.stdout.splitlines()
    assert [line.split()[0] for line in lines[-5:]] == list(WAYS) and "control loss" in lines[-7]


# --- the experiment --------------------------------------------------------------------------------------------------


def test_stretches_are_parts_of_files_at_random_places():
    files = [SourceFile(str(i), list(range(100 * i, 100 * i + 40))) for i in range(6)]
    found = evidence.stretches(files, 10, 1)
    for file, part in zip(files, found):
        start = part.ids[0] - file.ids[0]
        assert part.name == file.name and part.ids == file.ids[start : start + 10]
    assert found == evidence.stretches(files, 10, 1) != evidence.stretches(files, 10, 2)
    assert evidence.stretches(files, 40) == files


def test_random_files_are_as_many_and_of_neither_project(tokenizer):
    drawn = evidence.random_files(tokenizer, 400, 3)
    found = drawn(0)
    assert [len(file.ids) for file in found] == [400] * 3 and found == drawn(0) != drawn(1)
    packages = {Path(file.name).relative_to(sysconfig.get_paths()["stdlib"]).parts[0] for file in found}
    assert packages.isdisjoint({"asyncio", "xml"})


def test_a_file_is_measured_on_its_side(tokenizer):
    held = {PROJECT: [SourceFile("a", ids(12).tolist())], CONTROL: [SourceFile("b", ids(9, seed=2).tolist())]}
    task, model = ProjectTask(tokenizer, held), fresh()
    found = task.run(Arm("a", apply=lambda seed: Tuned(model, 2.0, 3.0, 4.0)), task.samples(), 0)
    plain = foretell(model, [held[PROJECT][0].ids, held[CONTROL][0].ids], line_ends(tokenizer, 384))
    assert found[0].metrics["loss"] == pytest.approx(plain[0].nats / 11, rel=1e-5)
    assert found[1].metrics["control_loss"] == pytest.approx(plain[1].nats / 8, rel=1e-5)
    assert "control_loss" not in found[0].metrics and "loss" not in found[1].metrics
    assert [found[1].metrics[name] for name in ("training_seconds", "flops", "bytes")] == [2, 3, 4]


def test_the_excess_is_the_gain_at_the_project_above_that_at_the_control(tokenizer):
    held = {side: [SourceFile(str(i), [1, 2, 3]) for i in range(8)] for side in (PROJECT, CONTROL)}
    task, rng, outcomes = ProjectTask(tokenizer, held), np.random.default_rng(0), {}
    for sample in task.samples():
        name = "loss" if sample.data["side"] == PROJECT else "control_loss"
        before = rng.uniform(2, 3)
        gained = (0.3 if name == "loss" else 0.1) + rng.uniform(-0.01, 0.01)
        for arm, value in ((evidence.PLAIN, before), (evidence.METHOD, before - gained)):
            outcomes[arm, sample.id, 0] = Outcome({name: value})
    arms = [Arm(evidence.PLAIN, role="plain"), Arm(evidence.METHOD)]
    made = Experiment("x", "", task, arms, evidence.PLAIN, lambda c: [])
    found = evidence.excess(Comparison(made, task.samples(), outcomes), evidence.METHOD).interval
    assert found.mean == pytest.approx(0.2, abs=0.01) and 0.18 < found.low < found.high < 0.22 and found.n == 8


def test_a_model_is_tuned_as_a_copy(project, tokenizer, files):
    model, method = fresh(), PersonalizedCode(way="prefix", **{**SMALL, "max_epochs": 1})
    run = Run(model, tokenizer, 2, (0,))
    begun = evidence.tuned(run, method, lambda seed: files, False, 0)
    done = evidence.tuned(run, method, lambda seed: files, True, 0)
    assert begun.flops == begun.seconds == 0 < min(done.flops, done.seconds) and begun.bytes == done.bytes > 0
    x = ids(1, 9)
    with torch.no_grad():
        before = fresh()(x).logits
        assert torch.equal(model(x).logits, before)
        tokens = files[1].ids[: SMALL["num_virtual_tokens"]]  # the first file is for validation
        expected = fresh()(torch.cat([torch.tensor([tokens]), x], 1)).logits[:, len(tokens) :]
        found = begun.model(input_ids=x, attention_mask=torch.ones_like(x)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
