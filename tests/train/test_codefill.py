"""codefill: three tasks, the penalty that ties them, and the trainer that draws them."""

import random
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.families import build
from transformers import LlamaConfig, LlamaForCausalLM

import tokenry
from tokenry.cli import main
from tokenry.core.errors import InputError
from tokenry.text.code.lexer import EOS, statements
from tokenry.text.code.views import CodeViews, code_views
from tokenry.train import CodeFill, CodeFillConfig, MultiTaskTrainer, SoftSharedLM, statement_completion_examples
from tokenry.train.completion.programs import read_programs
from tokenry.train.completion.tasks import TASKS, examples_of, statement_tails
from tokenry.train.completion.trainer import collate
from tokenry.train.completion.vocabulary import TYPE_IDS, encode_values, value_tokenizer

SOURCES = [
    f"import os\ndef name_{n}(path, other):\n    if path == {n}:\n        return os.path.join(path, 'x')\n"
    f"    value_{n} = other[path] + {n}\n    return value_{n}, name_{n}(other, path)\n" * 2
    for n in range(6)
]
SIZES = {"layers": 2, "width": 16, "heads": 2, "vocab_size": 320, "max_length": 32, "batch_size": 4, "lr": 1e-2}


@pytest.fixture(scope="module")
def words():
    return value_tokenizer([code_views(source).values for source in SOURCES], 320)


@pytest.fixture
def folder(tmp_path):
    for number, source in enumerate(SOURCES):
        place = tmp_path / "code" / f"package{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"m{number}.py").write_text(source)
    return tmp_path / "code"


def small(vocabulary, seed=0, layers=2, width=16):
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes))


def three(words, weight, seeds=(0, 1, 2)):
    sizes = {"ttp": len(TYPE_IDS), "tvp": len(words), "sc": len(words)}
    return SoftSharedLM({task: small(sizes[task], seed) for task, seed in zip(TASKS, seeds)}, weight)


def rows(words, tasks=TASKS, length=32):
    views = [code_views(source) for source in SOURCES]
    return [row for n, one in enumerate(views) for row in examples_of(one, words, tasks, length, n)]


def config(folder, **options):
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True, "seed": 0}
    return CodeFillConfig(str(folder), disable_tqdm=True, lr_scheduler_type="constant", **{**settings, **options})


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- examples --------------------------------------------------------------------------------------------------------


def test_values_are_encoded_one_by_one_as_in_their_text(words):
    values = code_views(SOURCES[0]).values
    text = "".join(f" {value}" for value in values)
    ids = [i for word in encode_values(words, values) for i in word]
    assert ids == words(text).input_ids and words.decode(ids) == text.replace(" <", "<")
    assert ids.count(words.eos_token_id) == values.count(EOS)


def test_labels_of_a_statement_are_exactly_its_tail(words):
    views = code_views(SOURCES[0])
    (row,) = statement_completion_examples(views, words, 3, 10_000)
    tail = set(statement_tails(views.values, random.Random(3)))
    owner = [n for n, word in enumerate(encode_values(words, views.values)) for _ in word]
    assert [label != -100 for label in row["labels"]] == [n in tail for n in owner]
    assert all(label in (-100, i) for label, i in zip(row["labels"], row["input_ids"]))
    for first, end in statements(views.values):
        inside = [n for n in range(first, end) if n in tail]
        assert not inside or inside == [*range(inside[0], end)]  # up to and with the mark of the end
        assert not inside or (inside[0] > first and len(inside) >= 2)
        assert bool(inside) == (end - first > 2)


def test_every_cut_of_a_statement_comes_up():
    values = ("return", "a", "+", "b", EOS)
    cuts = {min(statement_tails(values, random.Random(seed))) for seed in range(60)}
    assert cuts == {1, 2, 3}


def test_windows_hold_the_whole_program_in_order(words):
    views = code_views(SOURCES[1])
    found = [*examples_of(views, words, TASKS, 16, 0)]
    joined = {task: [i for row in found if row["task"] == task for i in row["input_ids"]] for task in TASKS}
    ids = [i for word in encode_values(words, views.values) for i in word]
    types = [TYPE_IDS[name] for name in views.types]
    assert joined["tvp"] == ids[: len(joined["tvp"])] and len(ids) - len(joined["tvp"]) < 2
    assert joined["ttp"] == types[: len(joined["ttp"])]
    assert max(len(row["input_ids"]) for row in found) == 16


def test_a_batch_is_learned_as_its_rows_alone(words):
    model, found = small(len(words)).eval(), rows(words, ("sc",))
    batch = [min(found, key=lambda row: len(row["input_ids"])), max(found, key=lambda row: len(row["input_ids"]))]
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in batch]
    alone = [model(**collate([row])["sc"]).loss.item() for row in batch]
    mean = sum(loss * count for loss, count in zip(alone, counts)) / sum(counts)
    assert float(model(**collate(batch)["sc"]).loss) == pytest.approx(mean, rel=1e-5)


# --- the penalty -----------------------------------------------------------------------------------------------------


def test_the_gradient_of_the_penalty_is_the_sum_of_differences(words):
    shared = three(words, 0.3)
    shared.penalty("tvp").backward()
    own = shared.blocks("tvp")
    for i, block in enumerate(own):
        others = [shared.blocks(task)[i] for task in ("ttp", "sc")]
        wanted = 2 * 0.3 * sum(block.detach() - other.detach() for other in others)
        torch.testing.assert_close(block.grad, wanted)
        for other in others:
            torch.testing.assert_close(other.grad, -2 * 0.3 * (block.detach() - other.detach()))
    assert shared.models["tvp"].get_input_embeddings().weight.grad is None


def test_a_weight_that_is_not_given_makes_the_penalty_a_tenth(words):
    shared = three(words, None)
    loss = torch.tensor(5.0)
    shared.weigh("sc", loss)
    assert float(shared.penalty("sc")) == pytest.approx(0.5, rel=1e-5)
    weight = shared.share_weight
    shared.weigh("tvp", torch.tensor(1.0))
    assert shared.share_weight == weight


def test_without_a_weight_the_value_model_is_trained_as_alone(words, tmp_path):
    """Bit for bit, against a loop over the same batches with a plain model."""
    shared, plain = three(words, 0.0), small(len(words), 1)
    trainer = MultiTaskTrainer(shared, config(tmp_path, task_probs=(0, 1, 0)), rows(words))
    batches = [batch["tvp"] for batch in trainer.get_train_dataloader()]
    others = state(shared.models["sc"])
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0, fused=False)
    trainer.train()
    for batch in batches:
        plain.train()
        plain(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert len(batches) == 6
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(shared.models["tvp"].state_dict()[name], value, rtol=1e-5, atol=1e-6)
    assert all(value.equal(others[name]) for name, value in shared.models["sc"].state_dict().items())


def test_without_a_weight_the_steps_of_other_tasks_change_nothing(words, tmp_path):
    """Not even by what the optimizer remembers: as many steps of values give the same model of values."""
    shared, alone = three(words, 0.0), three(words, 0.0)
    mixed = MultiTaskTrainer(shared, config(tmp_path, task_probs=(0.2, 0.4, 0.4), max_steps=20), rows(words))
    steps = sum("tvp" in batch for batch in mixed.get_train_dataloader())
    mixed.train()
    MultiTaskTrainer(alone, config(tmp_path, task_probs=(0, 1, 0), max_steps=steps), rows(words)).train()
    for name, value in alone.models["tvp"].state_dict().items():
        torch.testing.assert_close(shared.models["tvp"].state_dict()[name], value)
    assert 3 < steps < 15


def test_a_large_weight_draws_equal_models_on_equal_data_together(words, tmp_path):
    models = {"tvp": small(len(words), 1), "sc": small(len(words), 2)}
    shared = SoftSharedLM(models, 100.0)
    before = float(shared.distance("tvp"))
    same = [{**row, "task": task} for row in rows(words, ("tvp",)) for task in ("tvp", "sc")]
    options = {"task_probs": (0, 0.5, 0.5), "max_steps": 120, "learning_rate": 3e-3, "lr_scheduler_type": "linear"}
    MultiTaskTrainer(shared, CodeFillConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, **options), same).train()
    assert float(shared.distance("tvp")) < 0.01 * before


def test_export_is_the_plain_model(words):
    shared = three(words, 0.1).eval()
    ids = torch.tensor([words(" return os .").input_ids])
    plain = shared.export("tvp")
    assert isinstance(plain, LlamaForCausalLM)
    assert plain(ids).logits.equal(shared("tvp", ids).logits)
    with pytest.raises(InputError, match="no task 'x'; give one of ttp, tvp, sc"):
        shared.export("x")


# --- drawing tasks ---------------------------------------------------------------------------------------------------


def test_tasks_are_drawn_as_often_as_asked_and_values_in_the_same_order(words, tmp_path):
    def drawn(probs, steps):
        options = {"task_probs": probs, "max_steps": steps}
        return [*MultiTaskTrainer(three(words, 0.0), config(tmp_path, **options), rows(words)).get_train_dataloader()]

    batches = drawn((0.2, 0.4, 0.4), 200)
    counts = {task: sum(task in batch for batch in batches) for task in TASKS}
    assert all(len(batch) == 1 for batch in batches)
    assert counts["ttp"] == pytest.approx(40, abs=20) and counts["tvp"] == pytest.approx(80, abs=25)
    values = [batch["tvp"]["input_ids"] for batch in batches if "tvp" in batch]
    alone = [batch["tvp"]["input_ids"] for batch in drawn((0, 1, 0), len(values))]
    assert all(one.equal(other) for one, other in zip(values, alone))


@pytest.mark.parametrize(("combine", "expected"), [("sum", sum), ("min", min)])
def test_losses_of_all_tasks_are_combined(words, tmp_path, combine, expected):
    shared = three(words, 0.0)
    trainer = MultiTaskTrainer(shared, config(tmp_path, combine=combine), rows(words))
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == set(TASKS)
    losses = [float(shared(task, **part).loss) for task, part in batch.items()]
    assert float(trainer.compute_loss(shared, batch)) == pytest.approx(expected(losses), rel=1e-6)


def test_steps_of_values_are_counted_on_the_share_of_their_task(tmp_path):
    assert config(tmp_path, value_steps=8).max_steps == 20
    assert config(tmp_path, value_steps=8, combine="sum").max_steps == 8


# --- the method ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["soft", "hard", "none"])
def test_it_learns_and_its_tokens_are_read_again(folder, tmp_path, sharing, make_model, tokenizer):
    method = CodeFill(sharing=sharing, epochs=12, **SIZES)
    programs = method.read(folder, tokenizer)
    trainer = method.trainer(make_model("llama"), tokenizer, programs, tmp_path / "scratch", lambda *_: None)
    before = method.score(trainer, programs)
    trainer.train()
    after = method.score(trainer, programs)
    assert after["loss"] < 0.7 * before["loss"] and after["types"] > before["types"] + 0.2
    layers = {task: trainer.model.models[task].model.layers for task in TASKS}
    assert (layers["tvp"] is layers["sc"]) == (sharing == "hard")
    method.save(trainer, tmp_path / "out")
    model, words = tokenry.load(tmp_path / "out")
    ids = torch.tensor([words(" return os .").input_ids])
    assert model(ids).logits.equal(trainer.model.export("tvp").eval()(ids).logits)
    assert words.eos_token == EOS


def test_another_task_changes_neither_first_weights_nor_order_of_values(words):
    alone, all_three = (CodeFill(task_probs=probs, **SIZES).untrained(words) for probs in ((0, 1, 0), (0.2, 0.4, 0.4)))
    for name, value in alone.models["tvp"].state_dict().items():
        assert value.equal(all_three.models["tvp"].state_dict()[name])


def test_files_are_read_package_by_package_and_copies_once(folder, caplog):
    (folder / "package0" / "copy.py").write_text("# the same\n" + SOURCES[0])
    (folder / "package1" / "two.py").write_text("print 'two'\n")
    (folder / "empty.py").write_text("")
    (folder / "latin.py").write_bytes(b"x = '\xe9'\n")
    programs = read_programs(folder, 0)
    assert len(programs) == 6
    packages = [program.package for program in programs]
    assert len(set(packages)) == sum(a != b for a, b in zip(["", *packages], packages))
    for name in ("two.py", "empty.py", "latin.py"):
        assert any(name in record.message and "left out" in record.message for record in caplog.records)
    assert {p.package for p in read_programs(folder / "package0" / "m0.py", 0)} == {"m0"}


def test_javascript_is_read_beside_python_or_left_out_with_a_warning(folder, caplog, monkeypatch):
    (folder / "web").mkdir()
    (folder / "web" / "a.mjs").write_text("export const size = (rows) => rows.length;\n")
    (folder / "b.js").write_text("let a = 1\nlet b = a\n")
    found = {Path(program.name).name: program for program in read_programs(folder, 0)}
    assert (found["a.mjs"].package, found["b.js"].package) == ("web", "b")
    assert " ".join(found["b.js"].views.values) == "let a = <NUMBER> <EOS> let b = a <EOS>"
    monkeypatch.setitem(sys.modules, "tree_sitter", None)
    assert {Path(p.name).suffix for p in read_programs(folder, 0)} == {".py"}
    assert "2 files of JavaScript are left out: JavaScript needs the packages" in caplog.text
    with pytest.raises(InputError, match=r"run `pip install tokenry\[code\]`"):
        read_programs(folder / "web", 0)


def test_javascript_is_learned(words, tmp_path, make_model, tokenizer):
    for name in "abc":
        (tmp_path / f"{name}.js").write_text(f"function {name}(rows) {{ return rows.map((row) => row.{name}) }}\n" * 9)
    method = CodeFill(**SIZES)
    programs = method.read(tmp_path, tokenizer)
    trainer = method.trainer(make_model("llama"), tokenizer, programs, tmp_path / "out", value_steps=12)
    before = method.score(trainer, programs)
    trainer.train()
    after = method.score(trainer, programs)
    assert after["loss"] < before["loss"] and after["types"] > before["types"]


def test_the_verb_trains_on_a_folder_and_the_result_completes(folder, tmp_path, tokenizer):
    build("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = [part for name, value in {**SIZES, "epochs": 1}.items() for part in ("-o", f"{name}={value}")]
    given = ["--data", folder, "--output", tmp_path / "out", "--model", tmp_path / "model", "--hold-out", "0.3"]
    result = CliRunner().invoke(main, [*map(str, ["train", "--method", "codefill", *options, *given])])
    assert result.exit_code == 0, result.output
    assert "4 programs" in result.output and "tokenry decode --method codefill" in result.output
    (tmp_path / "x.py").write_text("def f(path):\n    return pa")
    place = ["--file", f"{tmp_path / 'x.py'}:2:14", "--model", str(tmp_path / "out")]
    result = CliRunner().invoke(main, ["decode", "--method", "codefill", *place])
    assert result.exit_code == 0 and "  path  (name; re-ranked, function)" in result.output


# --- refusals --------------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_shared_are_refused(words):
    for other in (small(9, layers=1), small(9, width=32)):
        with pytest.raises(InputError, match="blocks of 'sc' have other shapes than those of 'tvp'"):
            SoftSharedLM({"tvp": small(9), "sc": other}, 0.1)
    with pytest.raises(InputError, match="there is no model"):
        SoftSharedLM({}, 0.1)
    for weight in (-1.0, float("nan")):
        with pytest.raises(InputError, match="share_weight"):
            three(words, weight)


@pytest.mark.parametrize("probs", ["0.5,0.5,0.5", "0.2,0.8", "1,0,0", "-0.2,0.6,0.6", "a,b,c"])
def test_probabilities_that_are_none_are_refused(probs):
    with pytest.raises(InputError, match="task_probs"):
        CodeFill.from_strings([f"task_probs={probs}"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_probs": (0.5, 0.5, 0.5)}, "sum to 1"),
        ({"combine": "mean"}, "combine='mean' is not allowed; give picked, min, sum"),
        ({"task_probs": (0.5, 0, 0.5), "value_steps": 3}, "value_steps needs the task tvp"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        config(tmp_path, **options)


def test_a_task_without_model_or_examples_is_refused(words, tmp_path):
    with pytest.raises(InputError, match="the task 'ttp' has no model"):
        MultiTaskTrainer(SoftSharedLM({"tvp": small(len(words))}, 0.0), config(tmp_path), rows(words))
    with pytest.raises(InputError, match="the task 'sc' has no example"):
        MultiTaskTrainer(three(words, 0.0), config(tmp_path), rows(words, ("ttp", "tvp")))


def test_what_has_no_end_of_a_statement_is_refused(words, tokenizer):
    views = CodeViews(("x", "y"), ("LOCAL_VARIABLE",) * 2, (1, 1), (1, 2), (None, None))
    with pytest.raises(InputError, match="the program has no <EOS>"):
        statement_completion_examples(views, words, 0)
    with pytest.raises(InputError, match="use the one that codefill has trained"):
        statement_completion_examples(code_views("x = 1\n"), tokenizer, 0)


def test_no_programs_are_refused(tmp_path, make_model, tokenizer):
    (tmp_path / "a.py").write_text("print 'two'\n")
    with pytest.raises(InputError, match="holds no Python or JavaScript program that can be read"):
        CodeFill().read(tmp_path, tokenizer)
    with pytest.raises(InputError, match="no programs to train on"):
        CodeFill().trainer(make_model("llama"), tokenizer, [], tmp_path)
    with pytest.raises(InputError, match="does not divide into 8 heads"):
        CodeFill(width=24, heads=8)
